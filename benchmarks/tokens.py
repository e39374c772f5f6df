"""What a text delta costs, wall and CPU: bare loop, agx and peer in turn in one process, so noise hits all alike."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

from pydantic_ai import Agent

import agx

from .agents import (
    Drive,
    configure_agx,
    drive_agx,
    drive_bare,
    drive_hooked,
    make_agent,
    new_session,
    peer_client,
    peer_drive,
)
from .workers import Line


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of a client's core and of the clock per delta."""

    wall_us: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Costs:
    """A contestant's medians, and the medians of its ratios to the bare loop of the same round."""

    name: str
    cost: Cost
    wall_ratio: float
    cpu_ratio: float


async def flat_out(line: Line, url: str, load: tuple[int, int], times: tuple[int, int]) -> list[Costs]:
    """Measure runs at once and deltas of each (`load`), in rounds of all, how many with the peer (`times`)."""
    (sessions, deltas), (rounds, peer_rounds) = load, times
    configure_agx(url)
    async with peer_client(url) as redis:
        peer = peer_drive(redis)
        for drive in (drive_bare, drive_hooked, drive_agx, peer):
            await measure_round(drive, min(sessions, 5), 50)
        rows: list[dict[str, Cost]] = []
        for n in range(rounds):
            row = {"limit": await measure_round(drive_bare, sessions, deltas)}
            row["hooked"] = await measure_round(drive_hooked, sessions, deltas)
            row["agx"] = await measure_round(drive_agx, sessions, deltas)
            if n < peer_rounds:
                row["peer"] = await measure_round(peer, sessions, deltas)
            rows.append(row)
    await agx.aclose()
    return [_summarise(name, rows) for name in rows[0]]


async def measure_round(drive: Drive, sessions: int, deltas: int) -> Cost:
    agent = make_agent(deltas)
    names = [new_session("flat") for _ in range(sessions)]
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(_run(drive, agent, name))
    count = sessions * deltas
    return Cost((time.perf_counter() - wall) * 1e6 / count, (time.process_time() - cpu) * 1e6 / count)


async def _run(drive: Drive, agent: Agent[Any, str], name: str) -> None:
    await drive(agent, name)


def _summarise(name: str, rows: list[dict[str, Cost]]) -> Costs:
    pairs = [(row[name], row["limit"]) for row in rows if name in row]
    return Costs(
        name,
        Cost(statistics.median(cost.wall_us for cost, _ in pairs), statistics.median(cost.cpu_us for cost, _ in pairs)),
        statistics.median(cost.wall_us / limit.wall_us for cost, limit in pairs),
        statistics.median(cost.cpu_us / limit.cpu_us for cost, limit in pairs),
    )
