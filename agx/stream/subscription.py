"""The subscription: one connection brings a loop the messages of all its channels, through whatever breaks it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial

from redis.exceptions import RedisError

from ..redis.bus import Bus
from ..redis.redis_py import SOCKET_TIMEOUT, Connection, pack_command
from ..redis.retry import Backoff
from ..redis.supervisor import Supervisor

logger = logging.getLogger("agx")

_POLL = 1.0  # seconds
_PING_AFTER = 3  # silent polls after which the connection is probed
_NAMES = 1_000  # channels a command
_RECONNECT_FIRST, _RECONNECT_LAST = 0.05, 1.0
_STEADY = 5.0  # seconds a subscription must have held for the next loss to be news


class Subscription:
    """The channels of a loop. Messages are hints: one may be lost."""

    def __init__(self, bus: Bus, supervisor: Supervisor) -> None:
        self._bus = bus
        self._supervisor = supervisor
        self._channels: dict[bytes, tuple[Callable[[bytes], None], Callable[[], None]]] = {}
        self._wanted: dict[bytes, str] = {}  # by channel: SUBSCRIBE or UNSUBSCRIBE, the last one counts
        self._receiving: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._silent = 0  # polls since the last message

    def subscribe(self, channel: str, on_message: Callable[[bytes], None], on_subscribed: Callable[[], None]) -> None:
        """Have `on_message(message)` called for each message of a channel; one per channel.

        `on_subscribed()` is called whenever messages begin to come, again after a break too: look what was missed.
        """
        name = channel.encode()
        self._channels[name] = (on_message, on_subscribed)
        self._wanted[name] = "SUBSCRIBE"
        self._changed.set()
        if self._receiving is None:
            self._receiving = self._supervisor.start(self._receive, name="agx-subscription")

    def unsubscribe(self, channel: str) -> None:
        """Stop listening to a channel."""
        name = channel.encode()
        if self._channels.pop(name, None) is not None:
            self._wanted[name] = "UNSUBSCRIBE"
            self._changed.set()

    async def _receive(self) -> None:
        """Keep the subscriptions, through broken connections and changed servers, and pass messages on."""
        backoff = Backoff(_RECONNECT_FIRST, _RECONNECT_LAST)
        while True:
            if not self._channels:
                self._changed.clear()
                await self._changed.wait()
                continue
            started = time.monotonic()
            try:
                await self._follow()
            except (RedisError, OSError) as error:
                self._wanted.clear()  # the next connection subscribes to all channels
                if time.monotonic() - started > _STEADY:
                    backoff.reset()
                if not backoff.is_waiting:
                    logger.warning("agx: the hub lost Redis (%s), listeners wait", type(error).__name__)
                await asyncio.sleep(backoff.next())

    async def _follow(self) -> None:
        """Subscribe to all that is wanted, and pass messages on until the connection breaks."""
        # The connection itself: redis-py's PubSub takes 60 us a message, and can't be read without a channel.
        connection = await self._bus.make_subscriber()
        updates: asyncio.Task[None] | None = None
        try:
            await connection.open()
            self._wanted.clear()
            await _send(connection, "SUBSCRIBE", list(self._channels))
            updates = asyncio.get_running_loop().create_task(self._update(connection), name="agx-subscription-update")
            await self._read(connection, updates)
        finally:
            if updates is not None:
                updates.cancel()
                await asyncio.gather(updates, return_exceptions=True)
            await connection.close()

    async def _read(self, connection: Connection, updates: asyncio.Task[None]) -> None:
        self._silent = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL):
                    await self._pass_on(connection)
            if updates.done():
                updates.result()
            if not self._bus.is_current(connection):
                raise ConnectionError("the server was replaced")
            self._silent += 1
            if self._silent == _PING_AFTER:
                await _send(connection, "PING", [b"agx"])
            elif self._silent > 2 * _PING_AFTER:
                raise ConnectionError("no answer to a PING")

    async def _pass_on(self, connection: Connection) -> None:
        while True:
            message = await connection.read_message()
            self._silent = 0
            if not isinstance(message, list) or (calls := self._channels.get(message[1])) is None:
                continue
            on_message, on_subscribed = calls
            # A callback that raises must not take the messages of all other channels with it.
            if message[0] == b"message":
                self._supervisor.call(partial(on_message, message[2]), name="agx-on-message")
            elif message[0] == b"subscribe":
                self._supervisor.call(on_subscribed, name="agx-on-subscribed")

    async def _update(self, connection: Connection) -> None:
        """Send what changed; many joins and leaves become few commands."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changes, self._wanted = self._wanted, {}
            for verb in ("SUBSCRIBE", "UNSUBSCRIBE"):
                await _send(connection, verb, [name for name, wanted in changes.items() if wanted == verb])

    async def aclose(self) -> None:
        """Stop the task, which closes the connection."""
        receiving, self._receiving = self._receiving, None
        if receiving is not None:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)


async def _send(connection: Connection, verb: str, names: list[bytes]) -> None:
    for start in range(0, len(names), _NAMES):
        async with asyncio.timeout(SOCKET_TIMEOUT):
            await connection.send(pack_command((verb, *names[start : start + _NAMES])))
