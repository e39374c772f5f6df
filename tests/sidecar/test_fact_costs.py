"""What a fact costs the sidecar, in calls of functions and in commands: they do not depend on the machine."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from opentelemetry.sdk.trace import ReadableSpan
from support.made_facts import call, ended, node, started, tool
from support.replica import Queue
from support.waiting import wait_until

from agx.facts.reader import QueueEntry
from agx.facts.schema import Fact, encode
from agx.redis.address import parse_redis
from agx_sidecar import source
from agx_sidecar.link import Link, open_client
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Series
from agx_sidecar.metrics.sink import MetricsSink
from agx_sidecar.traces.encoding import encode_request
from agx_sidecar.traces.export import Export
from agx_sidecar.traces.otlp import Answer, Verdict
from agx_sidecar.traces.sink import EXPORT_PERIOD, TracesSink
from agx_sidecar.traces.spans import spans_of

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper


class Calls(Counter[str]):
    """Counts the calls of Python functions in a block."""

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, what: str, argument: object) -> None:
        if what == "call":
            self[frame.f_code.co_qualname] += 1


def some_facts(first: int, runs: int) -> list[Fact]:
    """A start, two model requests, a tool call and an end for each run."""
    made: list[Fact] = []
    for run_id in (f"run-{n}" for n in range(first, first + runs)):
        requests = [node(run_id, idx, model=call()) for idx in range(2)]
        made += [started(run_id), *requests, tool(run_id), ended(run_id)]
    return made


def entries(facts: list[Fact], first: int) -> list[QueueEntry]:
    return [QueueEntry(f"1700000000000-{first + n}", encode(fact)) for n, fact in enumerate(facts)]


def test_calls_of_a_fact_that_is_counted() -> None:
    fold = Fold(Series(), Series(), {0: Position()})
    fold.apply(0, entries(some_facts(0, 10), 0))
    again = entries(some_facts(10, 20), 100)
    with Calls() as calls:
        fold.apply(0, again)
    assert calls.total() / len(again) <= 18, calls


def test_calls_of_a_span() -> None:
    facts = some_facts(0, 20)
    encode_request([span for fact in facts for span in spans_of(fact)])
    with Calls() as calls:
        spans = [span for fact in facts for span in spans_of(fact)]
    assert len(spans) == 20 * 5
    assert calls.total() / len(spans) <= 21, calls
    with Calls() as calls:
        encode_request(spans)
    assert calls.total() / len(spans) <= 45, calls


class CountingLink(Link):
    """Counts the commands by name."""

    def __init__(self, url: str) -> None:
        super().__init__(open_client(parse_redis(url)))
        self.sent: Counter[str] = Counter()

    async def call(self, *command: Any) -> Any:
        self.sent[command[0]] += 1
        return await super().call(*command)


class CountingTransport:
    """A collector that takes everything."""

    requests = spans = 0

    def send(self, spans: Sequence[ReadableSpan]) -> Answer:
        self.requests += 1
        self.spans += len(spans)
        return Answer(Verdict.TAKEN)

    def cut(self) -> None: ...

    def close(self) -> None: ...


async def test_facts_that_come_one_by_one_are_decoded_once_and_read_and_exported_together(
    queue: Queue, redis_url: str
) -> None:
    link, transport, own, stop = CountingLink(redis_url), CountingTransport(), Series(), asyncio.Event()
    decode = cast("_lru_cache_wrapper[tuple[Fact, bool]]", source.make_caching_decoder())
    metrics = MetricsSink(link, "agx", 5.0, own, decode=decode)
    traces = TracesSink(link, "agx", Export(transport, own, 10.0), own, 60.0, decode=decode)
    queue.add(started("run-first"))  # so that the queue is there
    facts = [tool(f"run-{n}", scope="acme") for n in range(100)]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(metrics.run(queue.partitions, stop))
        tasks.create_task(traces.run(queue.partitions, stop))
        await wait_until(lambda: metrics.exporting)
        link.sent.clear()
        began = time.monotonic()
        for fact in facts:
            queue.add(fact)
            await asyncio.sleep(0.005)
        await wait_until(lambda: transport.spans == len(facts) and own.counter(i.FACTS, "tool").value == len(facts))
        seconds = time.monotonic() - began
        sent = link.sent.copy()
        stop.set()
    reads = seconds / source.READ_PAUSE + 2
    assert sent["XREAD"] <= reads
    assert sent["XREADGROUP"] <= reads
    assert max(transport.requests, sent["XACK"]) <= seconds / EXPORT_PERIOD + 2
    assert decode.cache_info().misses == len(facts) + 1
    await link.client.aclose()
