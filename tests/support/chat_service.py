"""A service with stored conversations, to be killed: it starts a run and prints when half of its answer is stored."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

import agx
from agx.sessions.redis_session import RedisSessions
from agx.sessions.sql_session import SqlSessions
from agx.web.runs import Runs, Who
from agx.web.turns import ask

from .agents import ScopeDeps, ScriptedAgent
from .waiting import wait_until


def serve(redis_url: str, database: str | None) -> None:
    """Start a run, print `reached` once half of its answer is on the stream, and wait to be killed.

    `database`: URL of the database of the conversations; None stores them in Redis.
    """
    asyncio.run(_serve(redis_url, database))


async def _serve(redis_url: str, database: str | None) -> None:
    client = Redis.from_url(redis_url)
    agx.configure(agx.Config(client, lease_ttl=0.9))
    store = RedisSessions(ttl=60) if database is None else SqlSessions(create_async_engine(database))
    agent = ScriptedAgent(hold_after=2)
    await Runs(agent.agent(), store, lambda *ids: ScopeDeps(), {}).start(Who(1, 1), "s", ask("Is it kept?"))
    await agent.reached.wait()

    async def half() -> str | None:
        stream = str(await client.xrange("agx:1:1:s"))
        return stream if "two " in stream else None

    seen: str = await wait_until(half)
    assert "three" not in seen
    print("reached", flush=True)
    await asyncio.Event().wait()
