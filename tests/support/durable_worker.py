"""A worker process of its own, to be killed: three model requests with two parallel tools each, then a text.

Every model request and every tool call is a line of the ledger, a file outside the process: `pid what number ms`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import agx
from agx.jobs.recipe import Recipe
from agx.sessions.base import SessionStore
from agx.sessions.redis_session import RedisSessions
from agx.sessions.sql_session import SqlSessions

from .agents import ScopeDeps

LEASE_TTL = 0.9
STEPS = 3
TOOLS = ("quick", "slow")
WORDS = [f"word{n} " for n in range(20)]
_PAUSE = 0.02  # seconds; long enough for a kill to come in between


class Ledger:
    """What happened, as lines of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, what: str, number: int) -> None:
        with self._path.open("a") as file:
            file.write(f"{os.getpid()} {what} {number} {time.time_ns() // 1_000_000}\n")

    def read(self) -> list[tuple[int, str]]:
        """Return who did what."""
        return [(pid, what) for pid, what, _ in self.read_times()]

    def read_times(self) -> list[tuple[int, str, int]]:
        """Return who did what, and when: ms since the epoch."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [(int(pid), f"{what} {number}", int(ms)) for pid, what, number, ms in (line.split() for line in lines)]


def make_agent(
    ledger: Ledger, *, steps: int = STEPS, words: Sequence[str] = WORDS, pause: float = _PAUSE
) -> Agent[ScopeDeps, str]:
    """Return an agent that calls both tools in each of its steps, then answers; it pauses between two words."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        step = sum(isinstance(message, ModelResponse) for message in messages)
        ledger.add("model", step)
        if step < steps:
            calls = [
                DeltaToolCall(name, f'{{"step": {step}}}', tool_call_id=f"{name}{step}") for name in ("quick", "slow")
            ]
            yield dict(enumerate(calls))
            return
        for word in words:
            await asyncio.sleep(pause)
            yield word

    agent = Agent(
        FunctionModel(stream_function=answer), name="support", deps_type=ScopeDeps, instructions="Answer politely."
    )

    @agent.tool_plain
    async def quick(step: int) -> str:
        ledger.add("quick", step)
        return f"quick {step}"

    @agent.tool_plain(metadata={"on_resume": "retry"})
    async def slow(step: int) -> str:
        ledger.add("slow", step)
        await asyncio.sleep(10 * pause)
        return f"slow {step}"

    return agent


def make_poison() -> Agent[ScopeDeps, str]:
    """Return an agent whose tool kills the process."""

    async def call(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[dict[int, DeltaToolCall]]:
        yield {0: DeltaToolCall("drink", "{}", tool_call_id="drink")}

    agent = Agent(FunctionModel(stream_function=call), name="poison", deps_type=ScopeDeps)

    @agent.tool_plain(metadata={"on_resume": "retry"})
    async def drink() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return agent


def open_database(ledger: Path) -> AsyncEngine:
    """Return the database of the agent `stored`, beside the ledger."""
    return create_async_engine(f"sqlite+aiosqlite:///{ledger.with_suffix('.sqlite')}")


def make_recipe(agent: Agent[ScopeDeps, str], store: SessionStore | None = None) -> Recipe:
    """Return a recipe that runs an agent on the session that a store holds; by default Redis."""
    opened = RedisSessions() if store is None else store

    async def make_call(job: agx.Job) -> agx.Call:
        ids = (job.scope_id, job.user_id, job.session_id)
        deps = ScopeDeps(scope=job.scope_id, user_id=job.user_id, session_id=job.session_id)
        return agx.Call(opened.open(*ids), agent, deps)

    return make_call


def work(url: str, ledger: Path) -> None:
    """Print `ready`, and work until SIGTERM."""
    asyncio.run(_work(url, ledger))


async def _work(url: str, path: Path) -> None:
    async with Redis.from_url(url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE_TTL, retention=60))
        agent, database = make_agent(Ledger(path)), open_database(path)
        recipes = {
            "support": make_recipe(agent),
            "stored": make_recipe(agent, SqlSessions(database)),
            "poison": make_recipe(make_poison()),
        }
        worker = agx.Worker(recipes)
        print("ready", flush=True)
        await worker.run()
        await agx.aclose()
        await database.dispose()
