"""A listener that joins after a stream has lost its end, or has expired, receives what the others receive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.listeners.listener import join
from agx.redis.bus import NodeBus
from agx.redis.redis_py import Reply


@pytest.fixture(autouse=True)
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client))
        yield client
        await client.flushdb()
        await agx.aclose()


async def follow(delivered: list[str], after: str | None = None) -> None:
    """Follow the session and its next runs."""
    with await join(1, 1, "s", wait=3, timeout=None, after=after, whole_session=True) as run:
        while (entries := await run.next()) is not None:
            delivered += [entry.type for entry in entries]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of new entries."""
    starts: list[str] = []
    execute = NodeBus.execute

    def count(bus: NodeBus, *args: Any, **options: bool) -> asyncio.Future[Reply]:
        if args[0] == "XRANGE" and args[2] != "-":
            starts.append(args[2])
        return execute(bus, *args, **options)

    monkeypatch.setattr(NodeBus, "execute", count)
    return starts


async def test_of_a_stream_that_is_gone(redis: Redis, reads: list[str]) -> None:
    former: list[str] = []
    latter: list[str] = []
    followers = [asyncio.create_task(follow(former))]
    await agx.start(1, 1, "s")
    await agx.stop(1, 1, "s", grace_period=60)
    await wait_until(lambda: former == ["begin", "end"])
    (feed,) = current_engine().hub._feeds.values()
    await redis.delete(feed.stream)
    reads.clear()
    followers.append(asyncio.create_task(follow(latter)))
    await wait_until(lambda: len(feed.subscribers) == 2 and all(s.caught_up for s in feed.subscribers))
    assert len(reads) < 5
    await agx.start(1, 1, "s")
    await wait_until(lambda: former[2:] == latter == ["begin"])
    for follower in followers:
        follower.cancel()


async def test_beside_a_cursor_that_no_entry_has(redis: Redis, reads: list[str]) -> None:
    """The cursor comes from a client, and may be of a server that has lost its data."""
    ahead: list[str] = []
    delivered: list[str] = []
    await agx.start(1, 1, "s")
    followers = [asyncio.create_task(follow(ahead, "9999999999999-0"))]
    (feed,) = await wait_until(lambda: list(current_engine().hub._feeds.values()))
    await wait_until(lambda: feed.cursor is not None)
    reads.clear()
    followers.append(asyncio.create_task(follow(delivered)))
    await wait_until(lambda: len(feed.subscribers) == 2 and all(s.caught_up for s in feed.subscribers))
    assert len(reads) < 6
    await agx.add(1, 1, "s", type="info", origin="test", body={})
    await agx.stop(1, 1, "s", grace_period=60)
    await wait_until(lambda: delivered == ["begin", "info", "end"])
    assert not ahead
    for follower in followers:
        follower.cancel()
