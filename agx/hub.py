"""The hub: all listeners of a loop share one subscription connection and one reading connection.

A session with listeners has one `Feed`. A wake-up (or, with writers that send none, a look once a second) has the feed
read what is new, once, and hand it to all its listeners. Source: contract, section 4; field notes, section 8.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hiredis
import orjson
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from . import keys
from .clients import close_client
from .connections import Bus, Reply
from .entryid import StreamId, format_id, parse_id

logger = logging.getLogger("agx")

READ = 500  # entries a read
QUEUE = 2_000  # entries a listener may lag behind before it reads for itself again
POLL = 1.0  # seconds; what a lost or never sent wake-up costs at most
_NAMES = 1_000  # channels a command
_PING_AFTER = 3  # silent polls of the subscription before its connection is probed
_RECONNECT_FIRST, _RECONNECT_LAST = 0.05, 1.0
_STEADY = 5.0  # seconds a subscription must have held for the next loss to be news


@dataclass(slots=True)
class StreamEntry:
    """An entry of a session stream, parsed once for all who listen."""

    id: StreamId
    type: str
    origin: str
    raw_body: bytes
    _json: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, entry_id: bytes, fields: dict[bytes, bytes]) -> StreamEntry:
        return cls(
            parse_id(entry_id.decode()),
            fields.get(b"type", b"").decode("utf-8", "replace"),
            fields.get(b"origin", b"").decode("utf-8", "replace"),
            fields.get(b"body", b"{}"),
        )

    @property
    def body(self) -> dict[str, Any]:
        """The body as an object; what someone else wrote that is none comes as `{"raw": text}`."""
        body = self._parse()
        return {"raw": self.raw_body.decode("utf-8", "replace")} if body is None else body

    def _parse(self) -> dict[str, Any] | None:
        try:
            body = orjson.loads(self.raw_body)
        except orjson.JSONDecodeError:
            return None
        return body if isinstance(body, dict) else None

    def to_dict(self) -> dict[str, Any]:
        return {"id": format_id(self.id), "type": self.type, "origin": self.origin, "body": self.body}

    def to_json(self) -> str:
        if self._json is None:
            # An object goes out as it stands: what nests deeper than the encoder goes can still be passed on.
            body = self.body if self._parse() is None else orjson.Fragment(self.raw_body)
            event = {"id": format_id(self.id), "type": self.type, "origin": self.origin, "body": body}
            self._json = orjson.dumps(event).decode()
        return self._json


class Subscriber:
    """One listener's place in a feed: what has been handed to it and not been taken yet."""

    def __init__(self) -> None:
        self.entries: deque[StreamEntry] = deque()
        self.caught_up = False  # the feed hands entries over; else the listener reads for itself
        self.news = asyncio.Event()


class Feed:
    """What is new in one session's stream, read once for all its listeners."""

    def __init__(self, bus: Bus, stream: str, on_overflow: Callable[[], None]) -> None:
        self.stream = stream
        self.cursor: StreamId | None = None  # up to here it has been handed out
        self.subscribers: set[Subscriber] = set()
        self.quiet = False  # no wake-up since the last look
        self._bus = bus
        self._on_overflow = on_overflow
        self._reading = False
        self._again = False

    def on_wake_up(self, _: bytes) -> None:
        """The writer says that there is something new."""
        self.quiet = False
        self.wake()

    def wake(self) -> None:
        """Read what is new, soon."""
        if self.cursor is None:
            return  # everybody still reads for itself
        if self._reading:
            self._again = True
            return
        self._reading, self._again = True, False
        read = self._bus.execute("XRANGE", self.stream, f"({format_id(self.cursor)}", "+", "COUNT", READ)
        read.add_done_callback(self._hand_out)

    def _hand_out(self, read: asyncio.Future[Reply]) -> None:
        self._reading = False
        if read.exception() is not None:
            return  # the next look tries again
        entries = [StreamEntry.of(*entry) for entry in read.result()]
        if entries:
            self.cursor = entries[-1].id
            for subscriber in self.subscribers:
                if not subscriber.caught_up:
                    continue
                subscriber.entries.extend(entries)
                if len(subscriber.entries) > QUEUE:
                    # Never skipped: it goes on reading from its own cursor, at its own pace.
                    subscriber.caught_up = False
                    self._on_overflow()
                subscriber.news.set()
        if self._again or len(entries) == READ:
            self.wake()


class Hub:
    """Subscriptions and feeds of a loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.gaps = self.rereads = self.listeners = 0
        self._feeds: dict[str, Feed] = {}
        self._callbacks: dict[bytes, Callable[[bytes], None]] = {}
        self._wanted: deque[tuple[str, bytes]] = deque()  # SUBSCRIBE and UNSUBSCRIBE still to be sent, in order
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._silent = 0  # polls since the last message

    def subscribe(self, channel: str, callback: Callable[[bytes], None]) -> None:
        """Have `callback(message)` called for each message of a channel; one per channel. Messages may be lost."""
        name = channel.encode()
        self._callbacks[name] = callback
        self._wanted.append(("SUBSCRIBE", name))
        self._changed.set()
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(self._receive(), name="agx-hub-receive"),
                loop.create_task(self._look(), name="agx-hub-look"),
            ]

    def unsubscribe(self, channel: str) -> None:
        """Stop listening to a channel."""
        name = channel.encode()
        if self._callbacks.pop(name, None) is not None:
            self._wanted.append(("UNSUBSCRIBE", name))
            self._changed.set()

    def join(self, session: keys.SessionKeys) -> tuple[Feed, Subscriber]:
        """Enter the feed of a session; costs the same with ten listeners and with ten thousand."""
        feed = self._feeds.get(session.stream)
        if feed is None:
            feed = self._feeds[session.stream] = Feed(self.bus, session.stream, self._count_reread)
            self.subscribe(session.wake_channel, feed.on_wake_up)
        subscriber = Subscriber()
        feed.subscribers.add(subscriber)
        self.listeners += 1
        return feed, subscriber

    def leave(self, session: keys.SessionKeys, feed: Feed, subscriber: Subscriber) -> None:
        """Leave a feed; the last one turns it off. Synchronous, so that a cancelled listener leaks nothing."""
        feed.subscribers.discard(subscriber)
        self.listeners -= 1
        if not feed.subscribers and self._feeds.get(session.stream) is feed:
            del self._feeds[session.stream]
            self.unsubscribe(session.wake_channel)

    def _count_reread(self) -> None:
        self.rereads += 1

    async def _receive(self) -> None:
        """Keep the subscriptions, through broken connections and changed servers, and pass messages on."""
        wait = _RECONNECT_FIRST
        while True:
            if not self._callbacks:
                # At least one channel has to be there before anything can be read.
                self._changed.clear()
                await self._changed.wait()
                continue
            started = time.monotonic()
            try:
                await self._follow_subscription()
            except (RedisError, OSError) as error:
                if time.monotonic() - started > _STEADY:
                    wait = _RECONNECT_FIRST
                if wait == _RECONNECT_FIRST:
                    logger.warning("agx: the hub lost Redis (%s), listeners wait", type(error).__name__)
                await asyncio.sleep(wait)
                wait = min(wait * 2, _RECONNECT_LAST)

    async def _follow_subscription(self) -> None:
        """Subscribe to all that is wanted, and pass messages on until the connection breaks."""
        client = await self.bus.open_subscriber()
        updates: asyncio.Task[None] | None = None
        try:
            # The connection itself: redis-py's PubSub takes 60 us a message, and can't be read without a channel.
            connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
            self._wanted.clear()
            await _send(connection, "SUBSCRIBE", list(self._callbacks))
            updates = asyncio.get_running_loop().create_task(self._update(connection), name="agx-hub-update")
            for feed in list(self._feeds.values()):
                feed.wake()
            await self._read(connection, updates)
        finally:
            if updates is not None:
                updates.cancel()
                await asyncio.gather(updates, return_exceptions=True)
            with contextlib.suppress(RedisError, OSError):
                await close_client(client)

    async def _read(self, connection: AbstractConnection, updates: asyncio.Task[None]) -> None:
        self._silent = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await self._pass_on(connection)
            if updates.done():
                updates.result()
            self._silent += 1
            if self._silent == _PING_AFTER:
                await _send(connection, "PING", [b"agx"])
            elif self._silent > 2 * _PING_AFTER:
                raise ConnectionError("no answer to a PING")

    async def _pass_on(self, connection: AbstractConnection) -> None:
        while True:
            # A read that is cancelled, between two messages or within one, loses nothing.
            message = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            self._silent = 0
            if message[0] == b"message" and (callback := self._callbacks.get(message[1])):
                callback(message[2])

    async def _update(self, connection: AbstractConnection) -> None:
        """Send what changed; many joins and leaves become few commands."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changes = {name: verb for verb, name in self._wanted}  # the last word on a channel counts
            self._wanted.clear()
            for verb in ("SUBSCRIBE", "UNSUBSCRIBE"):
                await _send(connection, verb, [name for name, wanted in changes.items() if wanted == verb])
            for name, verb in changes.items():
                # What was written between the listener's first read and the subscription.
                if verb == "SUBSCRIBE" and (feed := self._feeds.get(name.decode().removesuffix(":wake"))):
                    feed.wake()

    async def _look(self) -> None:
        """Look once a second at sessions that were quiet: their writer may send no wake-ups."""
        while True:
            await asyncio.sleep(POLL)
            for feed in list(self._feeds.values()):
                if feed.quiet:
                    feed.wake()
                feed.quiet = True

    async def aclose(self) -> None:
        """Stop the tasks and close the subscription."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send(connection: AbstractConnection, verb: str, names: list[bytes]) -> None:
    for start in range(0, len(names), _NAMES):
        command = hiredis.pack_command((verb, *names[start : start + _NAMES]))  # type: ignore[arg-type] # as in the bus
        await connection.send_packed_command(command, check_health=False)
        _check_cancelled()


def _check_cancelled() -> None:
    """Raise a cancellation that was swallowed: redis-py sends under asyncio.wait_for(), which loses one before 3.12."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
