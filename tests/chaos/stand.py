"""Sidecars alone, fed with made-up facts whose truth is known to the last bucket and the last span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from audit.ledger import Ledger, Series, series_of
from audit.verdict import SCALES, differences
from redis import Redis
from support.otlp import OtlpReceiver
from support.proxy import Proxy
from support.replica import Queue, Replica
from support.waiting import wait_until

from agx.embedded.server import EmbeddedServer
from agx.facts import schema as facts
from agx.facts.schema import Fact, ProcessState, Trace
from agx.redis import keys
from agx_sidecar.source import TRACES_GROUP
from agx_sidecar.traces.spans import spans_of

from .verdict import Verdict

_SETTLE = 120.0  # seconds for a backlog of the whole bound, on a machine that has other things to do
_SHOWN = 3  # differences of one name that are said


class TracedQueue(Queue):
    """Takes made-up facts, gives each its place in its run's trace, and knows what spans have to come of them."""

    def __init__(self, client: Redis, partitions: int, bound: int) -> None:
        super().__init__(client, partitions)
        self.facts = 0
        self.spans: dict[tuple[str, str], str] = {}  # their names
        self._bound = bound // partitions

    def add(self, *these: Fact) -> None:
        placed = [traced(fact) for fact in these]
        for fact in placed:
            for span in spans_of(fact):
                context = span.get_span_context()
                assert context is not None
                self.spans[f"{context.trace_id:032x}", f"{context.span_id:016x}"] = span.name
        self.facts += len(placed)
        super().add(*placed)

    def add_raw(self, payloads: Iterable[tuple[str, bytes]]) -> None:
        """Append as services do: never above the bound."""
        pipeline = self.redis.pipeline(transaction=False)
        for key, payload in payloads:
            pipeline.xadd(key, {facts.FIELD: payload}, maxlen=self._bound, approximate=True)
            pipeline.expire(key, 3_600)
        pipeline.execute()


def traced(fact: Fact) -> Fact:
    if isinstance(fact, ProcessState):
        return fact
    trace_id = facts.span_id(fact.run_id, "a") + facts.span_id(fact.run_id, "b")
    root = facts.span_id(fact.run_id, "run")
    if isinstance(fact, facts.RunStarted | facts.RunEnded):
        return replace(fact, trace=Trace(trace_id, root, None, True, False))
    return replace(fact, trace=Trace(trace_id, facts.span_id(fact.run_id, fact.id), root, True, False))


@dataclass
class Stand:
    """A server, sidecars, a collector, and the truth."""

    home: Path
    server: EmbeddedServer
    queue: TracedQueue
    otlp: OtlpReceiver
    collector: Proxy
    ledger: Ledger
    sidecars: list[Replica]
    _started: int = 0

    def start_sidecar(self) -> None:
        self._started += 1
        endpoint = f"http://127.0.0.1:{self.collector.port}"
        home = self.home / f"sidecar{self._started}"
        self.sidecars.append(Replica(home, self.server.url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint))

    def find_leader(self) -> Replica | None:
        return next((each for each in self.sidecars if each.leads()), None)

    async def leader(self) -> Replica:
        return await wait_until(lambda: asyncio.to_thread(self.find_leader), what="a sidecar leads")

    def wrong_series(self) -> list[str]:
        """Return every series of the leader's that is not the truth."""
        if (leader := self.find_leader()) is None:
            return ["no sidecar leads"]
        shown: dict[Series, int] = {}
        for (name, labels), value in leader.scrape().values.items():
            if name in SCALES:
                shown[series_of(name, dict(labels))] = round(Decimal(repr(value)) * SCALES[name])
        return [line for name in SCALES for line in [*self._wrong(name, shown)][:_SHOWN]]

    def _wrong(self, name: str, shown: dict[Series, int]) -> Iterable[str]:
        return (f"{name}: {line}" for line in differences(name, self.ledger.truth, shown))

    def waiting_facts(self) -> list[str]:
        """Return which partitions have facts that the traces sink has not acknowledged."""
        return [
            f"partition {n}: {group['pending']} facts pending, {group['lag']} unread"
            for n in range(self.queue.partitions)
            if self.queue.redis.exists(keys.queue("agx", n))
            for group in self.queue.redis.xinfo_groups(keys.queue("agx", n))
            if group["name"] == TRACES_GROUP.encode() and (group["pending"] or group["lag"])
        ]

    def stop(self) -> None:
        for sidecar in self.sidecars:
            sidecar.end()


async def stand_up(
    stack: AsyncExitStack,
    home: Path,
    *,
    partitions: int,
    bound: int,
    sidecars: int,
    receiver: type[OtlpReceiver] = OtlpReceiver,
) -> Stand:
    """Start all of it."""
    server = stack.enter_context(EmbeddedServer())
    client = stack.enter_context(Redis.from_url(server.url))
    otlp = stack.enter_context(receiver())
    collector = await stack.enter_async_context(Proxy(int(otlp.endpoint_http.rsplit(":", 1)[1])))
    stand = Stand(home, server, TracedQueue(client, partitions, bound), otlp, collector, Ledger(), [])
    stack.callback(stand.stop)
    for _ in range(sidecars):
        stand.start_sidecar()
    return stand


async def settled(wrong: Callable[[], list[str]]) -> list[str]:
    """Return what is still wrong when nothing is, or when the time for it is over."""
    deadline = time.monotonic() + _SETTLE
    while True:
        found = await asyncio.to_thread(wrong)
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.3)


async def judge(verdict: Verdict, stand: Stand) -> None:
    """Hold series and spans against the truth, once they agree or the time is over."""
    wrong = await settled(stand.wrong_series)

    def missing() -> list[str]:
        received = {(span.trace_id, span.span_id) for span in stand.otlp.spans}
        return [f"span {stand.queue.spans[each]} {each} missing" for each in stand.queue.spans if each not in received]

    spans = await settled(missing)
    spans_at_all = stand.otlp.spans
    told = {(span.trace_id, span.span_id, span.name) for span in spans_at_all}
    stray = told - {(*place, name) for place, name in stand.queue.spans.items()}
    waiting = await settled(stand.waiting_facts)
    verdict.facts_missed, verdict.spans_missing = len(wrong), len(spans)
    verdict.broken += wrong + spans + [f"a span that no fact has: {each}" for each in stray]
    verdict.broken += waiting
    repeats = len(spans_at_all) - len(told)
    verdict.times.append(f"{stand.queue.facts} facts, {len(told)} spans, {repeats} of them came again")
