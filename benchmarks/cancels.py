"""Cancel from another process: how long until the run has ended, mid-token, while the model is silent, in a tool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from redis.asyncio import Redis

import agx

from .agents import Drive, PeerDeps, configure_agx, drive_agx, peer_client, peer_drive
from .machine import CLIENT_CORE
from .workers import Line, Worker

STAGES = ("mid-token", "silent model", "async tool")
_BUSY = 6.0  # seconds that the agent would be busy if nobody cancelled it


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The worst and the median of a stage, in milliseconds, from the call of `cancel()` to the end of the run."""

    name: str
    stage: str
    count: int
    median_ms: float
    worst_ms: float


def measure_cancels(url: str, name: str, count: int, *, at_once: int) -> list[Cancelled]:
    """Cancel `count` runs in each stage, `at_once` at a time."""
    return [_measure_stage(url, name, stage, [at_once] * (count // at_once)) for stage in STAGES]


def _measure_stage(url: str, name: str, stage: str, batches: list[int]) -> Cancelled:
    with Worker(CLIENT_CORE, run_until_cancelled, url, name, stage, batches) as runner:
        took: list[float] = []
        while (sessions := runner.receive()) is not None:
            asked = asyncio.run(_cancel(url, name, sessions))
            runner.send("cancelled")
            took += [(ended - at) / 1e6 for ended, at in zip(runner.receive(), asked, strict=True)]
    took.sort()
    return Cancelled(name, stage, len(took), took[len(took) // 2], took[-1])


async def _cancel(url: str, name: str, sessions: list[str]) -> list[int]:
    """Cancel from this process; returns when each was asked for."""
    asked = []
    async with Redis.from_url(url) as redis:
        agx.configure(agx.Config(redis))
        for session in sessions:
            asked.append(time.monotonic_ns())
            if name == "agx":
                cancelled = await agx.cancel(1, 1, session)
            else:
                cancelled = await PeerDeps(redis=redis, user_id=1, session_id=session).cancel()
            if not cancelled:
                raise AssertionError(f"session {session} was not live")
        await agx.aclose()
    return asked


async def run_until_cancelled(line: Line, url: str, name: str, stage: str, batches: list[int]) -> None:
    """Run agents and say which are under way; then, when they were cancelled, when each ended."""
    configure_agx(url)
    async with peer_client(url) as redis:
        drive = drive_agx if name == "agx" else peer_drive(redis)
        for number, at_once in enumerate(batches):
            sessions = [f"cancel-{name}-{stage[0]}-{number}-{n}" for n in range(at_once)]
            reached = [asyncio.Event() for _ in sessions]
            runs = [
                asyncio.ensure_future(_drive(drive, _make_agent(stage, event), session))
                for session, event in zip(sessions, reached, strict=True)
            ]
            for event in reached:
                await event.wait()
            line.send(sessions)
            await line.receive()
            line.send(await asyncio.gather(*runs))
        line.send(None)
    await agx.aclose()


async def _drive(drive: Drive, agent: Agent[Any, str], session: str) -> int:
    try:
        await drive(agent, session)
    except Exception as error:
        if type(error).__name__ != "AgxCanceledError":
            raise
    return time.monotonic_ns()


def _make_agent(stage: str, reached: asyncio.Event) -> Agent[Any, str]:
    async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        if any(isinstance(message, ModelResponse) for message in messages):
            yield "done"
            return
        if stage == "async tool":
            yield {0: DeltaToolCall(name="work", json_args="{}", tool_call_id="call")}
            return
        if stage == "silent model":
            reached.set()
            await asyncio.sleep(_BUSY)
        for n in range(int(_BUSY * 30) if stage == "mid-token" else 1):
            yield "token "
            if n == 3:
                reached.set()
            await asyncio.sleep(1 / 30)

    agent: Agent[Any, str] = Agent(FunctionModel(stream_function=speak))

    @agent.tool_plain
    async def work() -> str:
        reached.set()
        await asyncio.sleep(_BUSY)
        return "worked"

    return agent
