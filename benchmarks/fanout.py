"""Many listeners: how late, how complete, and at what cost in CPU, memory and connections."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis import Redis as BlockingRedis
from redis.asyncio import Redis

import agx

from .agents import PeerDeps, configure_agx, peer_client
from .machine import CLIENT_CORE, SERVER_CORE, resident_bytes
from .stats import Delays
from .workers import Line, Worker, WorkerError

_PATIENCE = 60  # seconds without an event after which a listener fails
_TOGETHER = 100  # listeners that join at once


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many listeners, on how many sessions, at how many events a second and session, for how long."""

    sessions: int
    listeners: int
    rate: float
    seconds: float

    @property
    def events(self) -> int:
        """Events of one session."""
        return int(self.rate * self.seconds)


@dataclass(frozen=True, slots=True)
class Received:
    """What became of a crowd."""

    name: str
    crowd: Crowd
    complete: int  # listeners that got every event
    delays: Delays | None
    cpu_share: float  # of the listening process, of one core
    cpu_us: float  # the same, microseconds per delivery
    connections: int
    listener_bytes: float  # resident memory per listener
    failure: str = ""


def measure_crowd(url: str, name: str, crowd: Crowd) -> Received:
    """Have one process write and another listen. `name`: agx, peer, or peer-default (its pool left as it comes)."""
    with Worker(SERVER_CORE, write_all, url, name, crowd) as writer, BlockingRedis.from_url(url) as looking:
        writer.receive()
        before = _connections(looking)
        with Worker(CLIENT_CORE, listen_all, url, name, crowd) as listeners:
            try:
                listener_bytes = listeners.receive()
                connections = _connections(looking) - before
                writer.send("go")
                writer.receive()
                complete, delays, cpu_share, cpu_us = listeners.receive()
            except WorkerError as error:
                writer.send("go")
                writer.receive()
                reason = str(error).strip().splitlines()[-1].strip()
                return Received(name, crowd, 0, None, 0.0, 0.0, 0, 0.0, reason)
    return Received(name, crowd, complete, delays, cpu_share, cpu_us, connections, listener_bytes)


def _connections(redis: BlockingRedis) -> int:
    return int(redis.info("clients")["connected_clients"])


async def write_all(line: Line, url: str, name: str, crowd: Crowd) -> None:
    """Begin every session, then write its events, each with the time it was written, evenly over time."""
    configure_agx(url)
    async with peer_client(url) as redis:
        begin, add, end = _writing(name, redis)
        names = [f"crowd-{number}" for number in range(crowd.sessions)]
        await asyncio.gather(*(begin(session) for session in names))
        line.send("begun")
        await line.receive()

        async def write(session: str, phase: float) -> None:
            loop = asyncio.get_running_loop()
            due = loop.time() + phase / crowd.rate
            for _ in range(crowd.events):
                await asyncio.sleep(max(0.0, due - loop.time()))
                due += 1 / crowd.rate
                await add(session, {"at": time.monotonic_ns()})
            await end(session)

        await asyncio.gather(*(write(session, n / crowd.sessions) for n, session in enumerate(names)))
    await agx.aclose()


def _writing(
    name: str, redis: Redis
) -> tuple[
    Callable[[str], Awaitable[None]], Callable[[str, dict[str, Any]], Awaitable[None]], Callable[[str], Awaitable[None]]
]:
    if name == "agx":
        return (
            lambda session: agx.start(1, 1, session),
            lambda session, body: agx.add(1, 1, session, type="info", origin="benchmark", body=body),
            lambda session: agx.stop(1, 1, session),
        )
    return (
        lambda session: _peer(redis, session).start(),
        lambda session, body: _peer(redis, session).add(type="info", origin="benchmark", body=body),
        lambda session: _peer(redis, session).stop(),
    )


def _peer(redis: Redis, session: str) -> PeerDeps:
    return PeerDeps(redis=redis, user_id=1, session_id=session)


async def listen_all(line: Line, url: str, name: str, crowd: Crowd) -> tuple[int, Delays, float, float]:
    """Listen with everybody; says the memory of one listener once all have joined."""
    configure_agx(url)
    delays: list[int] = []
    joined = asyncio.Semaphore(0)

    async def follow(events: AsyncIterator[Any]) -> bool:
        count = 0
        async for event in events:
            if (at := event["body"].get("at")) is not None:
                delays.append(time.monotonic_ns() - at)
                count += 1
            elif event["type"] == "begin":
                joined.release()
        return count == crowd.events

    async with peer_client(url) if name == "peer" else Redis.from_url(url) as redis:

        def listen(session: str) -> AsyncIterator[Any]:
            if name == "agx":
                return agx.listen(1, 1, session, timeout=_PATIENCE, serialize=False)
            return _peer(redis, session).listen(timeout=_PATIENCE, serialize=False)

        gc.collect()
        before = resident_bytes()
        following: list[asyncio.Future[bool]] = []
        for n in range(crowd.listeners):
            following.append(asyncio.ensure_future(follow(listen(f"crowd-{n % crowd.sessions}"))))
            if n % _TOGETHER == _TOGETHER - 1 or n == crowd.listeners - 1:
                await _join(joined, following)
        gc.collect()
        line.send((resident_bytes() - before) / crowd.listeners)
        wall, cpu = time.perf_counter(), time.process_time()
        complete = sum(await asyncio.gather(*following))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    await agx.aclose()
    return complete, Delays.of(delays), cpu / wall, cpu * 1e6 / len(delays)


async def _join(joined: asyncio.Semaphore, following: list[asyncio.Future[bool]]) -> None:
    """Wait until the newest listeners have had their `begin`; raises what the first that failed raised."""
    waiting = asyncio.ensure_future(_acquire(joined, (len(following) - 1) % _TOGETHER + 1))
    while not waiting.done() and not any(task.done() for task in following):
        await asyncio.wait({waiting}, timeout=0.05)
    failed = [task for task in following if task.done() and task.exception() is not None]
    if failed:
        waiting.cancel()
        for task in following:
            task.cancel()
        await asyncio.gather(waiting, *following, return_exceptions=True)
        raise RuntimeError(f"{len(failed)} of {len(following)} failed, the first: {failed[0].exception()!r}")


async def _acquire(joined: asyncio.Semaphore, count: int) -> None:
    for _ in range(count):
        await joined.acquire()
