"""A wake-up that comes at a bad moment causes no delay: it may be that of the `end`, which no other one follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.redis.bus import NodeBus
from agx.redis.redis_py import Connection, Reply
from agx.stream import hub
from agx.stream.hub import Feed


@pytest.fixture(autouse=True)
async def configured(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Configure agx so that it polls often, but no session whose writer sends wake-ups; begin a session."""
    monkeypatch.setattr(hub, "POLL", 0.05)
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=3_600))
        await agx.start(1, 1, "s")
        yield
        await agx.stop(1, 1, "s", grace_period=1)
        await client.flushdb()
        await agx.aclose()


class Listener:
    """A listener whose reads of new entries a test can hold up or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[asyncio.Future[Reply]] = []  # of what is new
        self.wake_ups = 0
        self.delivered: list[dict[str, Any]] = []
        self.on_read = self.pass_on
        execute, on_wake_up, reads = NodeBus.execute, Feed.on_wake_up, current_engine().hub.bus

        def read(bus: NodeBus, *args: Any, **options: Any) -> asyncio.Future[Reply]:
            is_read = bus is reads and args[0] == "XRANGE" and args[2] != "-"
            reply = execute(bus, *args, **options)
            return asyncio.ensure_future(self.on_read(reply)) if is_read else reply

        def count(feed: Feed, message: bytes) -> None:
            self.wake_ups += 1
            on_wake_up(feed, message)

        monkeypatch.setattr(NodeBus, "execute", read)
        monkeypatch.setattr(Feed, "on_wake_up", count)
        self.listening = asyncio.create_task(self._listen())

    async def pass_on(self, reply: asyncio.Future[Reply]) -> Reply:
        return await reply

    async def _listen(self) -> None:
        async for event in agx.listen(1, 1, "s", serialize=False):
            self.delivered.append(event)


async def add() -> None:
    """Append an entry that is too large for its wake-up, so the feed has to read it."""
    await agx.add(1, 1, "s", type="info", origin="test", body={"text": "x" * 5_000})


async def test_while_a_listener_finds_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(monkeypatch)

    async def hold(reply: asyncio.Future[Reply]) -> Reply:
        found = await reply
        if not found:
            listener.on_read = listener.pass_on
            await add()
            await wait_until(lambda: listener.wake_ups)
        return found

    listener.on_read = hold
    await wait_until(lambda: len(listener.delivered) == 2, 10)
    listener.listening.cancel()


async def test_while_the_stream_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(monkeypatch)
    (feed,) = await wait_until(lambda: list(current_engine().hub._feeds.values()))
    await wait_until(lambda: any(subscriber.caught_up for subscriber in feed.subscribers))
    failed = 0

    async def fail(reply: asyncio.Future[Reply]) -> Reply:
        nonlocal failed
        failed += 1
        listener.on_read = listener.pass_on
        raise RedisConnectionError("cut")

    listener.on_read = fail
    await add()
    await wait_until(lambda: len(listener.delivered) == 2, 10)
    assert failed == 1
    listener.listening.cancel()


async def test_a_former_connection_that_ends_late_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS waits for the server's `close_notify`, which a server that was stopped does not send."""
    connections: list[tuple[Connection, Callable[[BaseException], None]]] = []
    receive, subscription = Connection.receive, current_engine().subscription

    def note(self: Connection, on_received: Callable[[], None], on_lost: Callable[[BaseException], None]) -> None:
        connections.append((self, on_lost))
        receive(self, on_received, on_lost)

    monkeypatch.setattr(Connection, "receive", note)
    listener = Listener(monkeypatch)
    await wait_until(lambda: subscription._connection)
    former, on_lost = next(one for one in connections if one[0] is subscription._connection)
    on_lost(RedisConnectionError("cut"))
    connection = await wait_until(lambda: subscription._connection is not former and subscription._connection)
    on_lost(RedisConnectionError("the former connection is closed at last"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert subscription._connection is connection
    listener.listening.cancel()
