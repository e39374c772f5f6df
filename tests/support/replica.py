"""Real sidecars for tests: processes on a real server, scraped over real HTTP."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import redis
from prometheus_client.parser import text_string_to_metric_families

from agx.facts import schema as facts
from agx.redis import keys

from .forked import Forked
from .waiting import wait_until_sync

PREFIX = "agx"
PARTITIONS = 4
LEASE = 1.0  # seconds; the real one is longer, so that tests need not wait for it


class Scrape:
    """One reading of /metrics: values by name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def get(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))

    def total(self, name: str, **labels: str) -> float:
        """The sum over all label sets that contain these labels."""
        wanted = set(labels.items())
        return sum(value for (known, has), value in self.values.items() if known == name and wanted <= has)

    def fleet(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The counters and histograms that only a leader shows."""
        own = ("agx_facts_", "agx_spans_", "agx_label_overflow")
        endings = ("_total", "_bucket", "_count", "_sum")
        return {
            key: value for key, value in self.values.items() if key[0].endswith(endings) and not key[0].startswith(own)
        }


class Replica:
    """One `agx-sidecar`. Ends with `end()`; its log is in `log`."""

    def __init__(self, home: Path, redis_url: str, **environment: str) -> None:
        home.mkdir(parents=True)
        self._log = home / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGX_", "OTEL_"))}
        self.child = Forked(
            _run_sidecar,
            log=self._log,
            environment={
                **inherited,
                "AGX_REDIS_URL": redis_url,
                "AGX_HTTP_PORT": "0",
                "AGX_LEADER_LEASE": str(LEASE),
                "AGX_CLAIM_IDLE": "1",
                **environment,
            },
        )
        self.alive = True

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def port(self) -> int:
        found = wait_until_sync(
            lambda: re.search(r"http://[^ ]+:(\d+)/metrics", self.log), what=f"a port in {self._log}"
        )
        return int(found[1])

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """GET a page; status 0 if nothing answers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def scrape(self) -> Scrape:
        status, body = self.get("/metrics")
        assert status == 200, (status, body, self.log)
        return Scrape(body)

    def leads(self) -> bool:
        return self.scrape().get("agx_sidecar_leader") == 1

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.alive = False
        return self.child.end(how)


def _run_sidecar() -> None:
    from agx_sidecar.__main__ import main  # only the process that is forked needs all of the sidecar

    sys.argv = ["agx-sidecar"]
    main()


StartReplica = Callable[..., Replica]  # a URL or nothing, and environment variables by keyword


class Queue:
    """What services do: write the meta, and facts into the partitions."""

    def __init__(self, client: redis.Redis | redis.RedisCluster, partitions: int = PARTITIONS) -> None:
        self.redis = client
        self.partitions = partitions
        self.redis.hset(keys.meta(PREFIX), mapping={"format": 1, "partitions": partitions, "lease_ttl": "15.0"})
        self.redis.expire(keys.meta(PREFIX), 600)

    def key(self, fact: facts.Fact) -> str:
        tenant = fact.service.name if isinstance(fact, facts.ProcessState) else fact.scope
        return keys.queue(PREFIX, keys.partition(tenant, self.partitions))

    def add(self, *these: facts.Fact) -> None:
        self.add_raw((self.key(fact), facts.encode(fact)) for fact in these)

    def add_raw(self, payloads: Iterable[tuple[str, bytes]]) -> None:
        pipeline = self.redis.pipeline(transaction=False)
        for key, payload in payloads:
            pipeline.xadd(key, {facts.FIELD: payload})
            pipeline.expire(key, 600)
        pipeline.execute()
