"""Scenes of sidecars alone: made-up facts whose truth is known, to the last bucket and the last span."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from random import Random

from audit.ledger import Ledger, Series, series_of
from audit.made_runs import Generator
from audit.verdict import SCALES, differences
from redis import Redis
from sidecar.replica import Queue, Replica
from support.otlp import OtlpReceiver
from support.proxy import Proxy
from support.waiting import wait_until

from agx import facts, keys
from agx.facts import Fact, ProcessBeat, Trace
from agx.server import EmbeddedServer
from agx_sidecar.spans import spans_of
from agx_sidecar.traces import GROUP

from .verdict import Verdict

BOUND = 100_000  # facts in the queues, agx's own default
_SETTLE = 120.0  # seconds for a backlog of the whole bound, on a machine that has other things to do
_BATCH = 10  # runs
_SHOWN = 3  # differences of one name that are said


class TracedQueue(Queue):
    """Takes made-up facts, gives each its place in its run's trace, and knows what spans have to come of them."""

    def __init__(self, client: Redis, partitions: int, bound: int) -> None:
        super().__init__(client, partitions)
        self.facts = 0
        self.spans: dict[tuple[str, str], str] = {}  # their names
        self._bound = bound // partitions

    def add(self, *these: Fact) -> None:
        traced = [_traced(fact) for fact in these]
        for fact in traced:
            for span in spans_of(fact):
                context = span.get_span_context()
                assert context is not None
                self.spans[f"{context.trace_id:032x}", f"{context.span_id:016x}"] = span.name
        self.facts += len(traced)
        super().add(*traced)

    def add_raw(self, payloads: Iterable[tuple[str, bytes]]) -> None:
        """Append as services do: never above the bound."""
        pipeline = self.redis.pipeline(transaction=False)
        for key, payload in payloads:
            pipeline.xadd(key, {facts.FIELD: payload}, maxlen=self._bound, approximate=True)
            pipeline.expire(key, 3_600)
        pipeline.execute()


def _traced(fact: Fact) -> Fact:
    if isinstance(fact, ProcessBeat):
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
            if group["name"] == GROUP.encode() and (group["pending"] or group["lag"])
        ]

    def stop(self) -> None:
        for sidecar in self.sidecars:
            sidecar.end()


async def stand_up(stack: AsyncExitStack, home: Path, *, partitions: int, bound: int, sidecars: int) -> Stand:
    """Start all of it."""
    server = stack.enter_context(EmbeddedServer())
    client = stack.enter_context(Redis.from_url(server.url))
    otlp = stack.enter_context(OtlpReceiver())
    collector = await stack.enter_async_context(Proxy(int(otlp.endpoint_http.rsplit(":", 1)[1])))
    stand = Stand(home, server, TracedQueue(client, partitions, bound), otlp, collector, Ledger(), [])
    stack.callback(stand.stop)
    for _ in range(sidecars):
        stand.start_sidecar()
    return stand


@dataclass(frozen=True)
class LeaderScene:
    """Leaders are killed one after the other while facts come at a steady pace."""

    name: str = "leader killed"
    weight: float = 3.0
    least: float = 10.0
    runs_per_second: float = 50.0  # six facts each: 100,000 and more in the full table

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Kill leaders for so long, and hold the last one's series and all spans against the truth."""
        verdict, chance, takeovers = Verdict(self.name), Random(f"{seed}/{self.name}"), list[float]()
        async with AsyncExitStack() as stack:
            stand = await stand_up(stack, home, partitions=4, bound=BOUND, sidecars=3)
            feeding = asyncio.create_task(self._feed(stand, seconds, seed))
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                leader = await stand.leader()
                await asyncio.sleep(chance.uniform(0.0, 1.5))
                stand.sidecars.remove(leader)
                killed = time.monotonic()
                await asyncio.to_thread(leader.end, signal.SIGKILL)
                stand.start_sidecar()
                verdict.faults["SIGKILL of the leader"] += 1
                await stand.leader()
                takeovers.append(time.monotonic() - killed)
            runs = await feeding
            await judge(verdict, stand)
            takeovers.sort()
            verdict.times.append(f"a successor leads after p50 {takeovers[len(takeovers) // 2]:.1f} s, "
                                 f"max {takeovers[-1]:.1f} s")  # fmt: skip
            verdict.outcomes["made up"] = runs
        return verdict

    async def _feed(self, stand: Stand, seconds: float, seed: int) -> int:
        generator = Generator(stand.queue, stand.ledger, seed)
        began, fed = time.monotonic(), 0
        while time.monotonic() < began + seconds:
            await asyncio.to_thread(generator.feed, range(fed, fed + _BATCH), 0.0)
            fed += _BATCH
            await asyncio.sleep(max(0.0, began + fed / self.runs_per_second - time.monotonic()))
        return fed


@dataclass(frozen=True)
class BacklogScene:
    """The collector is down while the queue fills to nine tenths of its bound; then all of it has to come."""

    name: str = "queue 90 % full"
    weight: float = 1.0
    least: float = 5.0

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Fill and drain a queue whose bound is in proportion to the time: agx's own in the full table."""
        verdict = Verdict(self.name)
        bound = min(BOUND, int(seconds * BOUND / 120))
        async with AsyncExitStack() as stack:
            stand = await stand_up(stack, home, partitions=1, bound=bound, sidecars=2)
            generator, fed = Generator(stand.queue, stand.ledger, seed), 0
            stand.collector.refuse()
            verdict.faults["collector down"] += 1
            while stand.queue.facts < 0.9 * bound:
                await asyncio.to_thread(generator.feed, range(fed, fed + _BATCH), 0.0)
                fed += _BATCH
            asked = time.monotonic()
            wrong = await settled(stand.wrong_series)
            verdict.broken += [f"while the collector is down: {line}" for line in wrong]
            verdict.times.append(f"{stand.queue.facts} facts counted within {time.monotonic() - asked:.1f} s without a "
                                 "collector")  # fmt: skip
            if stand.otlp.spans:
                verdict.broken.append("spans came through a collector that was down")
            stand.collector.accept()
            asked = time.monotonic()
            await judge(verdict, stand)
            verdict.times.append(f"all {len(stand.queue.spans)} spans there {time.monotonic() - asked:.1f} s later")
            verdict.outcomes["made up"] = fed
        return verdict


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
