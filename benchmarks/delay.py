"""At 30 tokens a second: what a delta costs the process of the agents, and how late a listener elsewhere sees it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import agx

from .agents import PeerDeps, configure_agx, drive_agx, drive_bare, make_agent, peer_client, peer_drive
from .lean import LeanWriter, read_lean
from .machine import CLIENT_CORE, SERVER_CORE
from .stats import Delays
from .workers import Line, Worker

RATE = 30.0  # tokens a second and session
_EDGE = 1.0  # seconds at both ends in which runs begin and end
CONTESTANTS = ("limit", "lean", "agx", "peer")


@dataclass(frozen=True, slots=True)
class Paced:
    """A contestant's medians over the rounds."""

    name: str
    cpu_us: float  # of the process that runs the agents, per delta
    cpu_ratio: float  # to the bare loop's of the same round
    delays: Delays | None
    listening_us: float  # CPU of the process that listens, per delta


def measure_paced(url: str, sessions: int, deltas: int, rounds: int) -> list[Paced]:
    """Run every contestant in turn, `rounds` times."""
    rows = [{name: _round(url, name, sessions, deltas, n) for name in CONTESTANTS} for n in range(rounds)]
    return [_summarise(name, rows) for name in CONTESTANTS]


@dataclass(frozen=True, slots=True)
class _Round:
    cpu_us: float
    delays: Delays | None = None
    listening_us: float = 0.0


def _summarise(name: str, rows: list[dict[str, _Round]]) -> Paced:
    mine = [row[name] for row in rows]
    received = sorted((one.delays for one in mine if one.delays is not None), key=lambda delays: delays.p99)
    return Paced(
        name,
        statistics.median(one.cpu_us for one in mine),
        statistics.median(row[name].cpu_us / row["limit"].cpu_us for row in rows),
        # The round in the middle, whole: percentiles do not average.
        received[len(received) // 2] if received else None,
        statistics.median(one.listening_us for one in mine),
    )


def _round(url: str, name: str, sessions: int, deltas: int, n: int) -> _Round:
    names = [f"paced-{name}-{n}-{number}" for number in range(sessions)]
    with Worker(CLIENT_CORE, run_agents, url, name, names, deltas) as runner:
        runner.receive()
        if name == "limit":
            runner.send("go")
            return _Round(float(runner.receive()))
        with Worker(SERVER_CORE, listen_all, url, name, names, deltas) as listener:
            listener.receive()
            runner.send("go")
            cpu_us = float(runner.receive())
            delays, listening_us = listener.receive()
            return _Round(cpu_us, delays, listening_us)


async def run_agents(line: Line, url: str, name: str, names: list[str], deltas: int) -> float:
    """Run the agents; returns CPU microseconds per delta, while all of them stream."""
    configure_agx(url)
    lean = await LeanWriter.open(url)
    async with peer_client(url) as redis:
        drive = {"limit": drive_bare, "lean": lean.drive(), "agx": drive_agx, "peer": peer_drive(redis)}[name]
        # Everything is imported, connected and warm before it counts.
        await asyncio.gather(*(drive(make_agent(20), f"warm-{name}-{number}") for number in range(5)))
        chunks = itertools.count()
        agent = make_agent(deltas, rate=RATE, on_chunk=lambda: _count(chunks))
        gc.collect()
        line.send("ready")
        await line.receive()
        running = asyncio.gather(*(drive(agent, session) for session in names))
        await asyncio.sleep(_EDGE)
        cpu, first = time.process_time(), next(chunks)
        await asyncio.sleep(deltas / RATE - 2 * _EDGE)
        cpu, last = time.process_time() - cpu, next(chunks)
        await running
    await agx.aclose()
    await lean.aclose()
    return cpu * 1e6 / (last - first)


def _count(chunks: Iterator[int]) -> None:
    next(chunks)


async def listen_all(line: Line, url: str, name: str, names: list[str], deltas: int) -> tuple[Delays, float]:
    """Listen to every session; each text is the times at which its chunks were given to the agent."""
    configure_agx(url)
    delays: list[int] = []

    async def follow(session: str) -> None:
        chunks = 0
        async for text in _texts(name, url, redis, session):
            now = time.monotonic_ns()
            times = [int(at) for at in text.split(";") if at]
            delays.extend(now - at for at in times)
            chunks += len(times)
        if chunks != deltas:
            raise AssertionError(f"{name}: {chunks} of {deltas} chunks of {session} arrived")

    async with peer_client(url) as redis:
        following = [asyncio.ensure_future(follow(session)) for session in names]
        await asyncio.sleep(0.5)  # all are waiting
        line.send("ready")
        cpu = time.process_time()
        await asyncio.gather(*following)
        cpu = time.process_time() - cpu
    await agx.aclose()
    return Delays.of(delays), cpu * 1e6 / len(delays)


async def _texts(name: str, url: str, redis: Any, session: str) -> AsyncIterator[str]:
    if name == "lean":
        async for text in read_lean(url, session):
            yield text
        return
    listen: Any = agx.listen(1, 1, session, wait=30, serialize=False)
    if name == "peer":
        listen = PeerDeps(redis=redis, user_id=1, session_id=session).listen(wait=30, serialize=False)
    async for event in listen:
        body = event["body"]
        yield body.get("content_delta") or body.get("content") or ""
