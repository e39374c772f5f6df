"""The subscription: one connection brings a loop the messages of all its channels, through whatever breaks it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ..redis.bus import Bus, fail_reply
from ..redis.redis_py import NO_REPLY, Connection, Reply, pack_command
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
        self._requested: dict[bytes, str] = {}  # by channel: SUBSCRIBE or UNSUBSCRIBE, whichever was requested last
        self._task: asyncio.Task[None] | None = None
        self._has_channels = asyncio.Event()
        self._connection: Connection | None = None  # while it can be used
        self._update: asyncio.Handle | None = None
        self._quiet_polls = 0  # polls since the last message

    def subscribe(self, channel: str, on_message: Callable[[bytes], None], on_subscribed: Callable[[], None]) -> None:
        """Have `on_message(message)` called for each message of a channel; one per channel.

        `on_subscribed()` is called whenever messages begin to come, again after a break too: look what was missed.
        """
        name = channel.encode()
        self._channels[name] = (on_message, on_subscribed)
        self._request(name, "SUBSCRIBE")
        self._has_channels.set()
        if self._task is None:
            self._task = self._supervisor.start(self._keep_connected, name="agx-subscription")

    def unsubscribe(self, channel: str) -> None:
        """Stop listening to a channel."""
        name = channel.encode()
        if self._channels.pop(name, None) is not None:
            self._request(name, "UNSUBSCRIBE")
        if not self._channels:
            self._has_channels.clear()

    def _request(self, name: bytes, verb: str) -> None:
        self._requested[name] = verb
        if self._connection is not None and self._update is None:
            # Many joins and leaves become few commands.
            self._update = asyncio.get_running_loop().call_soon(self._send_requested)

    def _send_requested(self) -> None:
        self._update = None
        changes, self._requested = self._requested, {}
        for verb in ("SUBSCRIBE", "UNSUBSCRIBE"):
            self._send(verb, [name for name, last in changes.items() if last == verb])

    def _send(self, verb: str, names: list[bytes]) -> None:
        for start in range(0, len(names), _NAMES):
            if self._connection is not None and self._connection.is_open:
                self._connection.write(pack_command((verb, *names[start : start + _NAMES])))

    async def _keep_connected(self) -> None:
        """Keep the subscriptions, through broken connections and changed servers."""
        backoff = Backoff(_RECONNECT_FIRST, _RECONNECT_LAST)
        while True:
            await self._has_channels.wait()
            started = time.monotonic()
            try:
                await self._connect()
            except (RedisError, OSError) as error:
                if time.monotonic() - started > _STEADY:
                    backoff.reset()
                if not backoff.is_waiting:
                    logger.warning("agx: the hub lost Redis (%s), listeners wait", type(error).__name__)
                await asyncio.sleep(backoff.next())

    async def _connect(self) -> None:
        """Subscribe to all channels on a new connection, and watch it until it breaks."""
        connection = await self._bus.make_subscriber()
        lost: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()  # gets the final error
        try:
            await connection.open()
            # Not redis-py's PubSub, which takes 60 us a message, and can't be read without a channel.
            connection.receive(partial(self._on_received, connection, lost), partial(fail_reply, lost))
            self._connection = connection
            self._requested.clear()
            self._send("SUBSCRIBE", list(self._channels))
            await self._watch(connection, lost)
        finally:
            self._connection = None
            await connection.close()

    async def _watch(self, connection: Connection, lost: asyncio.Future[Reply]) -> None:
        self._quiet_polls = 0
        while True:
            await asyncio.wait({lost}, timeout=_POLL)
            if lost.done():
                lost.result()
            if not self._bus.is_current(connection):
                raise RedisConnectionError("the server was replaced")
            self._quiet_polls += 1
            if self._quiet_polls == _PING_AFTER:
                self._send("PING", [b"agx"])
            elif self._quiet_polls > 2 * _PING_AFTER:
                raise RedisConnectionError("no answer to a PING")

    def _on_received(self, connection: Connection, lost: asyncio.Future[Reply]) -> None:
        self._quiet_polls = 0
        try:
            while (message := connection.take_received()) is not NO_REPLY:
                if isinstance(message, RedisError):
                    raise message
                self._pass_on(message)
        except RedisError as error:
            connection.abort()
            fail_reply(lost, error)

    def _pass_on(self, message: Reply) -> None:
        if not isinstance(message, list) or (calls := self._channels.get(message[1])) is None:
            return
        on_message, on_subscribed = calls
        # A callback that raises must not take the messages of all other channels with it.
        if message[0] == b"message":
            self._supervisor.call(partial(on_message, message[2]), name="agx-on-message")
        elif message[0] == b"subscribe":
            self._supervisor.call(on_subscribed, name="agx-on-subscribed")

    async def aclose(self) -> None:
        """Stop the task, which closes the connection."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
