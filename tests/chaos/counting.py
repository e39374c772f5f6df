"""Scenes of sidecars alone: leaders die, the collector is away until the queue is nearly full, a million facts come."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

from audit.made_runs import Generator
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support.made_facts import ended, node, started, tool
from support.otlp import OtlpReceiver
from support.waiting import wait_until

from agx.facts import schema as facts
from agx.redis import keys
from agx_sidecar.metrics.fold import RECENT
from agx_sidecar.traces.spans import spans_of

from .stand import Stand, judge, settled, stand_up, traced
from .verdict import Verdict

BOUND = 100_000  # facts in the queues, agx's own default
MILLION = 1_000_000
_BATCH = 10  # runs
_CHUNK = 1_000  # runs
_FULL_SHARE = 120.0  # seconds of a scene of weight 1 in the full table


@dataclass(frozen=True)
class LeaderScene:
    """Leaders are killed one after the other while facts come at a steady pace."""

    name: str = "leader killed"
    weight: float = 3.0
    in_short: bool = True
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
    in_short: bool = True
    least: float = 5.0

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Fill and drain a queue whose bound is in proportion to the time: agx's own in the full table."""
        verdict = Verdict(self.name)
        bound = min(BOUND, int(seconds * BOUND / _FULL_SHARE))
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


@dataclass
class CountingReceiver(OtlpReceiver):
    """A collector that only counts: a million facts are too many spans to keep."""

    count: int = 0

    def receive(self, protocol: str, headers: Mapping[str, str], request: ExportTraceServiceRequest) -> int:
        self.count += sum(len(scope.spans) for each in request.resource_spans for scope in each.scope_spans)
        return 200


@dataclass(frozen=True)
class MemoryScene:
    """A million facts as fast as one sidecar takes them; its memory must not grow with them."""

    name: str = "a million facts"
    weight: float = 1.0
    in_short: bool = True
    least: float = 3.0

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Feed facts in proportion to the time, a million in the full table."""
        verdict, sizes = Verdict(self.name), dict[int, int]()
        runs = int(min(1.0, seconds / _FULL_SHARE) * MILLION / len(_RUN))
        async with AsyncExitStack() as stack:
            stand = await stand_up(stack, home, partitions=1, bound=BOUND, sidecars=1, receiver=CountingReceiver)
            began = time.monotonic()
            for first in range(0, runs, _CHUNK):
                numbers = range(first, min(first + _CHUNK, runs))
                await asyncio.to_thread(stand.queue.add_raw, _payloads(numbers))
                # Far enough behind that nothing is trimmed unread.
                await wait_until(lambda least=numbers.stop - 5 * _CHUNK: asyncio.to_thread(_taken, stand, least), 120)
                sizes[numbers.stop * len(_RUN)] = _resident(stand)
            await wait_until(lambda: asyncio.to_thread(_taken, stand, runs), 120, what="all facts are taken")
            took = time.monotonic() - began
            _judge_memory(verdict, sizes)
            verdict.broken += _judge_counts(stand, runs)
            verdict.times.append(f"{runs * len(_RUN)} facts in {took:.0f} s")
            verdict.outcomes["made up"] = runs
        return verdict


_RUN = [traced(fact) for fact in (started("run-0"), node("run-0"), tool("run-0"), ended("run-0"))]
_ENCODED = [facts.encode(fact) for fact in _RUN]
_SPANS = sum(len(spans_of(fact)) for fact in _RUN)


def _payloads(numbers: range) -> Iterator[tuple[str, bytes]]:
    key = keys.queue("agx", 0)
    for n in numbers:
        for payload in _ENCODED:
            yield key, payload.replace(b"run-0", b"run-%d" % n)


def _taken(stand: Stand, runs: int) -> bool:
    """Whether so many runs are counted and exported."""
    assert isinstance(stand.otlp, CountingReceiver)
    return stand.otlp.count >= runs * _SPANS and stand.sidecars[0].scrape().total("agx_runs_total") >= runs


def _resident(stand: Stand) -> int:
    """Return the sidecar's memory, bytes."""
    status = Path(f"/proc/{stand.sidecars[0].child.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None, status
    return int(found[1]) * 1024


def _judge_memory(verdict: Verdict, sizes: Mapping[int, int]) -> None:
    """The ids of the last 100,000 facts are kept to know repeats; from twice as many on nothing may grow."""
    later = {count: size for count, size in sizes.items() if count >= 2 * RECENT}
    if not later:
        return
    first, last = min(later), max(later)
    most = max(later.values())
    verdict.times.append(f"{later[first] >> 20} MiB after {first} facts, {later[last] >> 20} MiB after {last}, "
                         f"most {most >> 20} MiB")  # fmt: skip
    if most > 1.2 * later[first]:
        verdict.broken.append(f"the sidecar grew from {later[first]} to {most} bytes")


def _judge_counts(stand: Stand, runs: int) -> list[str]:
    assert isinstance(stand.otlp, CountingReceiver)
    scraped = stand.sidecars[0].scrape()
    counted = {
        "runs": (scraped.total("agx_runs_total"), runs),
        "runs started": (scraped.total("agx_runs_started_total"), runs),
        "tool calls": (scraped.total("agx_tool_calls_total"), runs),
        "trimmed unread": (scraped.total("agx_queue_trimmed_total"), 0),
        "spans": (stand.otlp.count, runs * _SPANS),
    }
    return [f"{what}: {count}, truth {truth}" for what, (count, truth) in counted.items() if count != truth]
