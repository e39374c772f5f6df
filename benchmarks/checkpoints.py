"""What checkpoints cost: the same runs with and without them, in turn in one process."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis

import agx

from .agents import Drive, configure_agx, drive_agx, new_session
from .tokens import Cost, measure_round
from .workers import Line

_SESSIONS, _DELTAS = 40, 500
_FIRST_TOKENS = 100  # runs one after the other


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """Medians over the rounds; where there are two values, without and with checkpoints."""

    delta_ratio: float  # CPU per delta, with over without
    fixed_us: tuple[float, float]  # CPU of a run with one delta
    first_token_ms: tuple[float, float]  # from the call of `run()` until the model is asked
    stream_bytes: tuple[int, int]  # of a run with one delta


def drive_resumable(agent: Agent[Any, str], session_id: str) -> Awaitable[object]:
    return drive_agx(agent, session_id, resume="benchmark")


async def compare(line: Line, url: str, rounds: int) -> Checkpointed:
    """Measure runs that another process could resume beside runs that none could."""
    configure_agx(url)
    drives = (drive_agx, drive_resumable)
    for drive in drives:
        await measure_round(drive, 5, 50)
    ratios, fixed, first = list[float](), list[list[float]](), list[list[float]]()
    for _ in range(rounds):
        plain, resumable = [await measure_round(drive, _SESSIONS, _DELTAS) for drive in drives]
        ratios.append(resumable.cpu_us / plain.cpu_us)
        ones: list[Cost] = [await measure_round(drive, _SESSIONS, 1) for drive in drives]
        fixed.append([one.cpu_us for one in ones])
        first.append([await _time_first_token(drive) for drive in drives])
    sizes = [await _weigh(url, drive) for drive in drives]
    await agx.aclose()
    return Checkpointed(
        statistics.median(ratios),
        (statistics.median(one[0] for one in fixed), statistics.median(one[1] for one in fixed)),
        (statistics.median(one[0] for one in first), statistics.median(one[1] for one in first)),
        (sizes[0], sizes[1]),
    )


async def _time_first_token(drive: Drive) -> float:
    asked = list[float]()

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        asked.append(time.perf_counter())
        yield "token"

    agent = Agent(FunctionModel(stream_function=answer))
    times = []
    for _ in range(_FIRST_TOKENS):
        started = time.perf_counter()
        await drive(agent, new_session("first"))
        times.append((asked[-1] - started) * 1e3)
    return statistics.median(times)


async def _weigh(url: str, drive: Drive) -> int:
    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        await asyncio.sleep(0)
        yield "token"

    session = new_session("weigh")
    await drive(Agent(FunctionModel(stream_function=answer)), session)
    async with Redis.from_url(url) as client:
        # Not MEMORY USAGE: the server allocates 4 KiB at a time.
        entries = await client.execute_command("XRANGE", f"agx:1:1:{session}", "-", "+")
        return sum(len(part) for _, fields in entries for pair in fields.items() for part in pair)
