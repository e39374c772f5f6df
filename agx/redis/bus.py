"""The runtime's own connections to Redis: a bus is one connection that all commands of a kind share."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .clients import SOCKET_TIMEOUT, close_client

Arg = bytes | str | int | float
# A reply's shape depends on the command; each caller knows its own.
Reply = Any

CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

_STALE_AFTER = 1.0  # seconds of idleness after which a connection is looked at before it is used


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script on one key; sent by its hash."""

    source: str

    @property
    def digest(self) -> str:
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class Bus(ABC):
    """Sends commands of one key each, and gives their replies as futures.

    Nothing is repeated here: whoever issues a command knows whether it may be sent again.
    """

    @property
    @abstractmethod
    def breaks(self) -> int:
        """How often a connection was opened or a server changed: "unbroken since" is a comparison."""

    @abstractmethod
    def execute(self, *args: Arg) -> asyncio.Future[Reply]:
        """Issue a command; the future has its reply, or a RedisError. Synchronous up to there."""

    @abstractmethod
    def run(self, script: Script, key: str, *args: Arg) -> asyncio.Future[Reply]:
        """Issue a script on one key; loads it where the server does not know it yet."""

    @abstractmethod
    async def open_subscriber(self) -> Redis:
        """Return a new client for a subscription; raises RedisError or OSError where no server is known."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop sending and close the connections; what was waiting fails."""


@dataclass(slots=True)
class _Call:
    args: tuple[Arg, ...]
    reply: asyncio.Future[Reply]
    script: tuple[Script, tuple[Arg, ...]] | None


class NodeBus(Bus):
    """The bus of one server.

    Commands that are issued while a round trip is under way leave together in the next one, so a thousand callers cost
    as many round trips as one. `on_break` is called whenever a connection has been opened.
    """

    def __init__(self, open_client: Callable[[], Redis], on_break: Callable[[], None]) -> None:
        self._open_client = open_client
        self._client = open_client()
        self._on_break = on_break
        self._connection: AbstractConnection | None = None
        self._used = 0.0
        self._waiting: list[_Call] = []
        self._sender: asyncio.Task[None] | None = None
        self._digests: dict[Script, str] = {}
        self._breaks = 0

    @property
    def breaks(self) -> int:
        return self._breaks

    def execute(self, *args: Arg) -> asyncio.Future[Reply]:
        return self._issue(args, None)

    def run(self, script: Script, key: str, *args: Arg) -> asyncio.Future[Reply]:
        digest = self._digests.get(script)
        if digest is None:
            digest = self._digests[script] = script.digest
        return self._issue(("EVALSHA", digest, 1, key, *args), (script, (key, *args)))

    def _issue(self, args: tuple[Arg, ...], script: tuple[Script, tuple[Arg, ...]] | None) -> asyncio.Future[Reply]:
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(args, reply, script))
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send(), name="agx-bus")
        return reply

    async def _send(self) -> None:
        try:
            while self._waiting:
                calls, self._waiting = self._waiting, []
                try:
                    await self._round_trip(calls)
                except BaseException as error:
                    _fail(calls, _closing() if isinstance(error, asyncio.CancelledError) else error)
                    if not isinstance(error, (RedisError, OSError)):
                        raise
        finally:
            self._sender = None
            leftover, self._waiting = self._waiting, []
            _fail(leftover, _closing())

    async def _round_trip(self, calls: list[_Call]) -> None:
        connection = await self._connect()
        # hiredis packs a command in 1 us, redis-py in 15; and one deadline for all replies is one timer, not one each.
        packed = b"".join([hiredis.pack_command(call.args) for call in calls])  # type: ignore[arg-type] # its stub takes one argument
        await connection.send_packed_command(packed, check_health=False)
        async with asyncio.timeout(SOCKET_TIMEOUT):
            read_only = await self._read_replies(connection, calls)
        self._used = asyncio.get_running_loop().time()
        if read_only:
            # What was the primary is one no more; the name it was found by may lead elsewhere by now.
            await connection.disconnect()

    async def _read_replies(self, connection: AbstractConnection, calls: list[_Call]) -> bool:
        """Settle the calls, in their order; returns whether the server has refused to write."""
        callbacks = self._client.response_callbacks
        read_only = False
        for call in calls:
            try:
                reply = await connection.read_response(timeout=math.inf)
            except NoScriptError as error:
                if call.script is None:
                    _fail([call], error)
                else:
                    script, args = call.script
                    self._waiting.append(_Call(("EVAL", script.source, 1, *args), call.reply, None))
            except ResponseError as error:
                read_only = read_only or isinstance(error, ReadOnlyError)
                _fail([call], error)
            else:
                if not call.reply.done():
                    parse = None if call.script is not None else callbacks.get(str(call.args[0]))
                    call.reply.set_result(reply if parse is None else parse(reply))
        return read_only

    async def _connect(self) -> AbstractConnection:
        """Return the connection, opened where it is not open, or has broken while it was idle."""
        connection = self._connection
        if connection is None:
            connection = self._connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        elif not connection.is_connected or await self._is_stale(connection):
            await connection.disconnect()
            await connection.connect()  # type: ignore[no-untyped-call]
        else:
            return connection
        self._breaks += 1
        self._on_break()
        return connection

    async def _is_stale(self, connection: AbstractConnection) -> bool:
        if asyncio.get_running_loop().time() - self._used < _STALE_AFTER:
            return False
        try:
            return bool(await connection.can_read())  # nobody asked, so it can only be a goodbye
        except (RedisError, OSError):
            return True

    async def open_subscriber(self) -> Redis:
        return self._open_client()

    async def aclose(self) -> None:
        if (sender := self._sender) is not None:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        await close_client(self._client)


def fail_reply(reply: asyncio.Future[Reply], error: BaseException) -> None:
    """Give a reply its error, which need not be fetched: a caller that is cancelled never does."""
    if not reply.done():
        reply.set_exception(error)
        reply.exception()


def _fail(calls: list[_Call], error: BaseException) -> None:
    for call in calls:
        fail_reply(call.reply, error)


def _closing() -> RedisConnectionError:
    return RedisConnectionError("the runtime is closing")
