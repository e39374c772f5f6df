"""A process that was stopped, or whose loop is busy, is no outage: its runs start as soon as it reads the replies."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps

import agx
from agx.redis import retry
from agx.redis.bus import NodeBus, Script
from agx.redis.keys import SessionKeys
from agx.redis.redis_py import Connection, Reply
from agx.stream import hub
from agx.stream.append_scripts import BEGIN

TIMEOUT = 0.1  # seconds
TICK = 0.005


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "COMMAND_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(retry, "_TICK", TICK)


def stop() -> None:
    time.sleep(2 * TIMEOUT)


async def run_one() -> None:
    assert await agx.run(FakeSession(), Agent("test"), "Hi", deps=ScopeDeps())


async def test_a_stop_while_begin_is_on_its_way(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply is in the socket when the process goes on."""
    await run_one()  # opens the connections
    stops = 0
    run = NodeBus.run

    def stop_after(self: NodeBus, script: Script, key: str, *args: Any) -> asyncio.Future[Reply]:
        nonlocal stops
        reply = run(self, script, key, *args)
        if script is BEGIN:
            stops += 1
            asyncio.get_running_loop().call_soon(stop)
        return reply

    monkeypatch.setattr(NodeBus, "run", stop_after)
    await run_one()
    assert stops == 1


async def test_a_stop_while_a_connection_is_opened(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt to connect has failed when the process goes on."""
    opened = 0
    open_connection = Connection.open

    async def fail_first(self: Connection) -> None:
        nonlocal opened
        opened += 1
        if opened > 1:
            stop()
            if opened == 2:
                raise ConnectionError("too late")
        await open_connection(self)

    monkeypatch.setattr(Connection, "open", fail_first)
    await run_one()
    assert opened > 2


async def test_a_loop_that_is_busy_all_the_time(configured: Redis) -> None:
    """Opening the connections takes a dozen turns of the loop."""
    loop, running = asyncio.get_running_loop(), asyncio.create_task(run_one())
    began = time.monotonic()

    def hold_up() -> None:
        if not running.done():
            time.sleep(2 * TICK)
            loop.call_soon(hold_up)

    hold_up()
    await running
    assert time.monotonic() - began > TIMEOUT


class EmptyBus:
    """The bus of a server that has no key."""

    def execute(self, *args: Any) -> asyncio.Future[Reply]:
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        reply.set_result(None if args[0] == "GET" else [])
        return reply


async def test_a_stop_while_a_lease_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failover the process's own run had no time to take its lease again, so it does not count as dead."""
    now = 1_000.0
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: now))
    bus: Any = EmptyBus()
    feed = hub.Feed(bus, SessionKeys.of("agx", 1, 1, "s"), patience=4.0, on_overflow=lambda: None)

    async def poll_after(seconds: float) -> bool:
        nonlocal now
        now += seconds
        feed.poll()
        await asyncio.sleep(0)
        return feed.dead

    assert not await poll_after(hub.POLL)
    assert not await poll_after(60)
    are_dead = [await poll_after(hub.POLL) for _ in range(5)]
    assert are_dead == [False, False, True, True, True]
