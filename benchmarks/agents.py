"""The agent that every contestant runs, and the ways to run it: bare, through agx, through the peer."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pydantic_ai_stream as peer
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import AgentStreamEvent, ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis

import agx

Drive = Callable[[Agent[Any, str], str], Awaitable[object]]

_names = itertools.count()


def new_session(kind: str) -> str:
    """Return a session id that no other run of this process has."""
    return f"{kind}-{next(_names)}-{random.getrandbits(32):x}"


def make_agent(
    deltas: int, *, rate: float | None = None, on_chunk: Callable[[], None] = lambda: None
) -> Agent[Any, str]:
    """Return an agent whose model sends `deltas` chunks: flat out, or `rate` a second, each with its own time.

    It yields to the loop at each chunk, as a model behind a socket does. `on_chunk()` is called for paced ones.
    """

    async def flat_out(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        for _ in range(deltas):
            await asyncio.sleep(0)
            yield "token "

    async def paced(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        assert rate is not None
        loop = asyncio.get_running_loop()
        due = loop.time() + random.random() / rate
        for _ in range(deltas):
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += 1 / rate
            on_chunk()
            yield f"{time.monotonic_ns()};"

    return Agent(FunctionModel(stream_function=flat_out if rate is None else paced))


async def drive_bare(agent: Agent[Any, str], session_id: str) -> None:
    """The limit: pydantic-ai's own loop, its events looked at by nobody."""
    async with agent.iter("Hello") as run:
        async for node in run:
            if Agent.is_model_request_node(node):
                async with node.stream(run.ctx) as stream:
                    async for _ in stream:
                        pass


@dataclass
class _Idle(AbstractCapability[Any]):
    """Looks at the events, and does nothing with them."""

    def wrap_run_event_stream(
        self, ctx: RunContext[Any], *, stream: AsyncIterable[AgentStreamEvent]
    ) -> AsyncIterable[AgentStreamEvent]:
        return stream


async def drive_hooked(agent: Agent[Any, str], session_id: str) -> None:
    """What pydantic-ai itself costs as soon as anybody looks at its events from a capability, as agx does."""
    await agent.run("Hello", capabilities=[_Idle()])


@dataclass
class _Session(agx.Session):
    async def load(self) -> None: ...
    async def save(self) -> None: ...


@dataclass(kw_only=True)
class _Deps(agx.Deps):
    scope: int | str = 1

    def get_scope_id(self) -> int | str:
        return self.scope


def drive_agx(
    agent: Agent[Any, str], session_id: str, *, scope: int | str = 1, resume: str | None = None
) -> Awaitable[object]:
    return agx.run(_Session(), agent, "Hello", _Deps(user_id=1, session_id=session_id, scope=scope), resume=resume)


@dataclass
class _PeerSession(peer.Session):
    async def load(self) -> None: ...
    async def save(self) -> None: ...


@dataclass(kw_only=True)
class PeerDeps(peer.Deps):
    """What the peer asks of its users."""

    def get_scope_id(self) -> int:
        return 1


def peer_drive(redis: Redis) -> Drive:
    """Return the peer's way; the pool of `redis` is raised by its maker."""

    async def drive(agent: Agent[Any, str], session_id: str) -> None:
        await peer.run(_PeerSession(), agent, "Hello", PeerDeps(redis=redis, user_id=1, session_id=session_id))

    return drive


def peer_client(url: str) -> Redis:
    """Return a client with its pool raised, without which the peer fails at 100 connections."""
    return Redis.from_url(url, max_connections=100_000)


def configure_agx(url: str) -> None:
    agx.configure(agx.Config(Redis.from_url(url), service_name="benchmark"))
