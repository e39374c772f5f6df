"""docs/how-to/prometheus.md: its configuration on a real Prometheus over two sidecars, whose leader is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.docs import every_block
from support.terminals import Terminals
from support.waiting import wait_until_sync

import agx
from agx.embedded.child import Child, draw_ports
from dashboards.preview.stack import SCRAPE_FILE

pytestmark = pytest.mark.prometheus


class Host(Terminals):
    """Two sidecars and the page's Prometheus, on one machine."""

    def __init__(self, home: Path, redis_url: str) -> None:
        super().__init__(home, {"AGX_REDIS_URL": redis_url, "AGX_HTTP_HOST": "127.0.0.1"})
        self.redis_url = redis_url
        self.started: dict[int, Child] = {}  # by port
        *self.sidecars, self.prometheus = draw_ports(3)

    def start_sidecars(self, block: str) -> None:
        block = block.replace("redis://localhost:6379", self.redis_url).replace("0.0.0.0", "127.0.0.1")
        for port in self.sidecars:
            ready = f"http://localhost:{port}/readyz"
            self.started[port], _ = self.keep_running(f"export AGX_HTTP_PORT={port}\n{block}", url=ready)

    def configure(self, config: str) -> None:
        config = config.replace(": 15s", ": 500ms")
        for name, port in zip(("sidecar-a", "sidecar-b"), self.sidecars, strict=True):
            config = config.replace(f"{name}:9464", f"localhost:{port}")
        (self.home / "prometheus.yml").write_text(config)

    def start_prometheus(self, block: str) -> None:
        address = f"localhost:{self.prometheus}"
        self.keep_running(block, f"--web.listen-address={address}", url=f"http://{address}/-/ready")

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return what Prometheus answers now."""
        reply = httpx.post(f"http://localhost:{self.prometheus}/api/v1/query", data={"query": query}).json()
        assert reply["status"] == "success", reply
        found: list[dict[str, Any]] = reply["data"]["result"]
        return found

    def leader(self) -> int:
        """Return the port of the sidecar that leads, once Prometheus has seen it."""
        (leading,) = wait_until_sync(lambda: self.ask("agx_sidecar_leader == 1"), what="a leader")
        return int(leading["metric"]["instance"].rpartition(":")[2])


@pytest.fixture
def host(redis_url: str, tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path, redis_url) as host:
        yield host


def test_every_block(host: Host) -> None:
    with every_block("docs/how-to/prometheus.md") as page:
        host.run(page.take("bash", "pip install"))
        host.start_sidecars(page.take("bash", "agx-sidecar"))
        config = page.take("yaml")
        is_the_one_that_is_deployed(config)
        host.configure(config)
        assert "SUCCESS" in host.run(page.take("bash", "promtool"))
        host.start_prometheus(page.take("bash", "prometheus --config.file"))
        a_takeover_is_invisible(host)
        host.run(page.take("bash", "agx-$board.json"))
        boards = [json.loads(path.read_text()) for path in sorted(host.home.glob("agx-*.json"))]
        assert [board["uid"] for board in boards] == ["agx-agents", "agx-models", "agx-runtime"]
        for query in [page.take("promql") for _ in range(5)]:
            wait_until_sync(lambda query=query: host.ask(query), what=query)
        groups = httpx.get(f"http://localhost:{host.prometheus}/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}


def is_the_one_that_is_deployed(config: str) -> None:
    (page,), (deployed,) = (yaml.safe_load(text)["scrape_configs"] for text in (config, SCRAPE_FILE.read_text()))
    for discovery in (page.pop("static_configs"), deployed.pop("dns_sd_configs")):
        assert discovery
    assert page == deployed


def run_agents(redis_url: str, runs: int) -> None:
    """Let a service work."""

    async def work() -> None:
        async with Redis.from_url(redis_url) as client:
            agx.configure(agx.Config(redis=client))
            agent = Agent(TestModel(model_name="gpt-4o-mini"), name="helper")
            for n in range(runs):
                await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps(session_id=f"s{n}"))
            await agx.aclose()

    asyncio.run(work())


def a_takeover_is_invisible(host: Host) -> None:
    run_agents(host.redis_url, 3)

    def completed() -> list[tuple[str, str]]:
        found = host.ask('agx_runs_total{outcome="completed"}')
        return [(series["metric"].get("instance", ""), series["value"][1]) for series in found]

    wait_until_sync(lambda: completed() == [("", "3")], what="three runs, of no replica")
    leader = host.leader()
    os.killpg(host.started[leader].pid, signal.SIGKILL)
    wait_until_sync(lambda: host.leader() != leader, what="the other leads")
    run_agents(host.redis_url, 2)
    wait_until_sync(lambda: completed() == [("", "5")], what="five runs, in the same series")
    # Nothing was counted twice: the series never fell, and rose by what was run.
    assert host.ask('resets(agx_runs_total{outcome="completed"}[1m])')[0]["value"][1] == "0"
