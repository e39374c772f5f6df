"""`events?follow=session`: one stream shows the turns of all pages, costs little between them, ends at a shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import ScopeDeps, scripted
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.listeners.sse import event_chunks
from agx.redis.keys import SessionKeys
from agx.testing import MemorySession

KEYS = SessionKeys.of("agx", 1, 1, "s")


async def ask(text: str) -> None:
    await agx.run(MemorySession(id="s"), Agent(scripted([text])), "Hi", deps=ScopeDeps())


def is_waiting() -> bool:
    """Return whether the listener has read all there is, and waits for a run to begin."""
    feed = current_engine().hub._feeds.get(KEYS.stream)
    return feed is not None and all(subscriber.waits_for_run for subscriber in feed.subscribers)


class Channel:
    """A listener of the session; `take()` gives the next events."""

    def __init__(self, after: str = "") -> None:
        self.chunks = event_chunks(1, 1, "s", after, wait=0.01, whole_session=True)
        self.left: list[dict[str, Any]] = []

    async def take(self, until: str) -> list[dict[str, Any]]:
        """Return the next events, up to one of a type."""
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(20):
            while not found or found[-1]["type"] != until:
                while not self.left:
                    frames = (await anext(self.chunks)).decode().split("\n\n")
                    self.left = [json.loads(frame.partition("data: ")[2]) for frame in frames if frame]
                found.append(self.left.pop(0))
        return found


@pytest.fixture
async def channel(configured: Redis) -> AsyncIterator[Channel]:
    channel = Channel()
    async with aclosing(channel.chunks):
        yield channel


def text(events: list[dict[str, Any]]) -> str:
    return "".join(e["body"].get("content", "") for e in events if e["body"].get("part_kind") == "text")


async def test_a_stream_without_a_run_gets_the_first_and_each_next_one(channel: Channel) -> None:
    taking = asyncio.create_task(channel.take("end"))
    await wait_until(lambda: current_engine().hub.listeners)
    for n in range(3):
        await ask(f"answer {n}")
        events = await taking
        assert [events[0]["type"], text(events)] == ["begin", f"answer {n}"]
        taking = asyncio.create_task(channel.take("end"))
    taking.cancel()


async def test_it_goes_on_behind_the_end_that_a_page_has(configured: Redis) -> None:
    await ask("old")
    last = [event async for event in agx.listen(1, 1, "s", serialize=False)][-1]["id"]
    channel = Channel(last)
    async with aclosing(channel.chunks):
        taking = asyncio.create_task(channel.take("end"))
        await wait_until(is_waiting)
        await ask("new")
        events = await taking
        assert [events[0]["type"], text(events)] == ["begin", "new"]


async def test_a_page_that_missed_a_run_gets_the_next_one_from_its_begin(configured: Redis) -> None:
    await ask("old")
    first, *_ = [event["id"] async for event in agx.listen(1, 1, "s", serialize=False)]
    await ask("new")
    channel = Channel(first)
    async with aclosing(channel.chunks):
        gap, begin, *rest = await channel.take("end")
        assert gap["body"]["superseded_by"] == begin["body"]["run_id"]
        assert text(rest) == "new"


async def test_a_stream_that_expired_is_no_gap(configured: Redis) -> None:
    await ask("old")
    last = [event async for event in agx.listen(1, 1, "s", serialize=False)][-1]["id"]
    await configured.delete("agx:1:1:s")
    channel = Channel(last)
    async with aclosing(channel.chunks):
        taking = asyncio.create_task(channel.take("end"))
        await wait_until(is_waiting)
        current_engine().hub._feeds[KEYS.stream].dead = True  # what it is seconds later
        await ask("new")
        assert (await taking)[0]["type"] == "begin"


async def test_a_lost_run_is_reported_and_the_next_one_follows(channel: Channel, configured: Redis) -> None:
    await agx.start(1, 1, "s")
    assert (await channel.take("begin"))[0]["type"] == "begin"
    taking = asyncio.create_task(channel.take("error"))
    await asyncio.sleep(0)
    feed = current_engine().hub._feeds[KEYS.stream]
    feed.dead = True
    for subscriber in feed.subscribers:
        subscriber.deliver([])
    (error,) = await taking
    assert error["body"]["code"] == "run_lost"
    await agx.stop(1, 1, "s")
    await channel.take("end")
    await ask("next")
    assert text(await channel.take("end")) == "next"


async def test_an_idle_stream_asks_redis_no_more_than_a_live_one(channel: Channel, configured: Redis) -> None:
    await ask("old")
    await channel.take("end")
    taking = asyncio.create_task(channel.take("end"))
    await wait_until(is_waiting)
    feed = current_engine().hub._feeds[KEYS.stream]
    assert not feed.needs_poll(60)
    ordinary, subscriber = current_engine().hub.join(KEYS)
    feed._dead_since = 0.0
    assert ordinary is feed
    assert feed.needs_poll(60), "a listener of one run polls for clients that send no wake-ups"
    current_engine().hub.leave(KEYS, feed, subscriber)
    await ask("new")
    await taking
