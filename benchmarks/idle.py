"""What idleness costs: the renewals of many live sessions, and the memory of a live run."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel

import agx

from .agents import Drive, configure_agx, drive_agx, drive_bare, new_session, peer_client, peer_drive
from .machine import cpu_seconds, resident_bytes
from .workers import Line

_TOGETHER = 200  # sessions that start at once
_SETTLING = 16.0  # seconds


@dataclass(frozen=True, slots=True)
class Idle:
    """Live sessions about which nothing happens."""

    sessions: int
    scopes: int
    start_us: float  # CPU of the process per session, start and stop together
    seconds: float
    cpu_share: float  # of one core, while idle
    server_share: float
    growth: float  # resident memory at the end of the idle time over that at its beginning
    keys: int  # on the server, per session


async def hold_sessions(line: Line, url: str, server_pid: int, load: tuple[int, int], seconds: float) -> Idle:
    """Open sessions spread over scopes (`load`), hold them, and close them."""
    sessions, scopes = load
    configure_agx(url)
    async with peer_client(url) as looking:
        names = [(f"scope-{n % scopes}", new_session("idle")) for n in range(sessions)]
        cpu = time.process_time()
        for first in range(0, sessions, _TOGETHER):
            await asyncio.gather(*(agx.start(scope, 1, session) for scope, session in names[first:][:_TOGETHER]))
        starting = time.process_time() - cpu
        keys = await looking.dbsize()
        # Renewals have begun by then, and what a writer keeps of its last events for a lease's time is gone.
        await asyncio.sleep(_SETTLING)
        gc.collect()
        memory, wall = resident_bytes(), time.perf_counter()
        cpu, server = time.process_time(), cpu_seconds(server_pid)
        await asyncio.sleep(seconds)
        wall = time.perf_counter() - wall
        cpu, server = time.process_time() - cpu, cpu_seconds(server_pid) - server
        growth = resident_bytes() / memory
        stopping = time.process_time()
        for first in range(0, sessions, _TOGETHER):
            await asyncio.gather(*(agx.stop(scope, 1, session) for scope, session in names[first:][:_TOGETHER]))
        starting += time.process_time() - stopping
    await agx.aclose()
    return Idle(
        sessions, scopes, starting * 1e6 / sessions, wall, cpu / wall, server / wall, growth, round(keys / sessions)
    )


async def weigh_runs(line: Line, url: str, name: str, runs: int) -> float:
    """Return the resident bytes of a live run whose model is silent. `name`: limit, agx or peer."""
    configure_agx(url)
    silence, reached = asyncio.Event(), asyncio.Semaphore(0)

    async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        reached.release()
        await silence.wait()
        yield "done"

    agent: Agent[Any, str] = Agent(FunctionModel(stream_function=speak))
    async with peer_client(url) as redis:
        drive: Drive = {"limit": drive_bare, "agx": drive_agx, "peer": peer_drive(redis)}[name]
        running = [await _begin(drive, agent, reached) for _ in range(20)]
        gc.collect()
        before = resident_bytes()
        running += [await _begin(drive, agent, reached) for _ in range(runs)]
        gc.collect()
        weight = (resident_bytes() - before) / runs
        silence.set()
        await asyncio.gather(*running)
    await agx.aclose()
    return weight


async def _begin(drive: Drive, agent: Agent[Any, str], reached: asyncio.Semaphore) -> asyncio.Future[None]:
    running = asyncio.ensure_future(drive(agent, new_session("weight")))
    await reached.acquire()
    return running
