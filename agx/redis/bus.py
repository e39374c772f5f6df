"""The runtime's own connections to Redis: a bus is one connection that all commands of a kind share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .redis_py import NO_REPLY, SOCKET_TIMEOUT, Address, Arg, Connection, Reply, pack_command

logger = logging.getLogger("agx")

CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

_STALE_AFTER = 1.0  # seconds of idleness after which a connection is looked at before it is used
_ASK_SENTINEL_EVERY = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script on one key; sent by its hash."""

    source: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", sha1(self.source.encode(), usedforsecurity=False).hexdigest())


class Bus(ABC):
    """Sends commands of one key each, and gives their replies as futures.

    Nothing is repeated here: the caller decides whether a command may be sent again.
    """

    delivers_messages = True  # a message is lost only with the subscriber's connection

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
    async def make_subscriber(self) -> Connection:
        """Return a connection for a subscription, to be opened; raises RedisError or OSError: no server is known."""

    @abstractmethod
    def is_current(self, connection: Connection) -> bool:
        """Whether a subscriber's server is, as far as is known, still one that gets the messages.

        One that was replaced while it was only slow still answers, and receives nothing any more.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Stop sending and close the connections; what was waiting fails."""


@dataclass(slots=True)
class _Call:
    args: tuple[Arg, ...]
    reply: asyncio.Future[Reply]
    script: tuple[Script, tuple[Arg, ...]] | None


class NodeBus(Bus):
    """The bus of one server, or of the primary that Sentinel names.

    Commands that are issued while a round trip is under way leave together in the next one, so a thousand callers cost
    as many round trips as one. `on_break` is called whenever a connection has been opened. Errors that leave a bus are
    RedisErrors or OSErrors; a server that has become a replica is a broken connection.
    """

    def __init__(self, make_connection: Callable[[], Connection], on_break: Callable[[], None]) -> None:
        self._make_connection = make_connection
        self._connection = make_connection()
        self._on_break = on_break
        self._used = 0.0
        self._waiting: list[_Call] = []
        self._sender: asyncio.Task[None] | None = None
        self._breaks = 0
        self._primary: Address | None = None  # that Sentinel named last
        self._watch: asyncio.Task[None] | None = None
        self._deadline: asyncio.Timeout | None = None  # of what is under way

    @property
    def breaks(self) -> int:
        return self._breaks

    def execute(self, *args: Arg) -> asyncio.Future[Reply]:
        return self._issue(args, None)

    def run(self, script: Script, key: str, *args: Arg) -> asyncio.Future[Reply]:
        return self._issue(("EVALSHA", script.digest, 1, key, *args), (script, (key, *args)))

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
                except (RedisError, OSError) as error:
                    _fail(calls, error)
                except Exception as error:
                    logger.exception("agx: a command could not be sent or its reply not be read")
                    _fail(calls, error)
                except BaseException:
                    _fail(calls, _closing())
                    raise
        finally:
            self._sender = None
            if self._waiting:
                leftover, self._waiting = self._waiting, []
                _fail(leftover, _closing())

    async def _round_trip(self, calls: list[_Call]) -> None:
        packed = b"".join([pack_command(call.args) for call in calls])
        if not await self._is_usable():
            await self._open()
        connection = self._connection
        try:
            async with asyncio.timeout(SOCKET_TIMEOUT) as self._deadline:
                await connection.send(packed)
                is_replica = await self._read_replies(connection, calls)
        except BaseException:
            # Replies that were not read would be taken for those of the next commands.
            await connection.close_socket()
            raise
        self._used = asyncio.get_running_loop().time()
        if is_replica:
            # The name by which it was found may lead to another server by now.
            await connection.close_socket()

    async def _read_replies(self, connection: Connection, calls: list[_Call]) -> bool:
        """Settle the calls, in their order; returns whether the server reports that it is a replica."""
        is_replica = False
        for call in calls:
            try:
                reply = connection.take_received()
                if reply is NO_REPLY:
                    reply = await connection.read()
            except NoScriptError as error:
                if call.script is None:
                    _fail([call], error)
                else:
                    script, args = call.script
                    self._waiting.append(_Call(("EVAL", script.source, 1, *args), call.reply, None))
            except (ReadOnlyError, MasterDownError) as error:
                is_replica = True
                _fail([call], RedisConnectionError(f"the server is a replica: {error}"))
            except ResponseError as error:
                _fail([call], error)
            else:
                if not call.reply.done():
                    call.reply.set_result(reply if call.script is not None else connection.parse(call.args[0], reply))
        return is_replica

    async def _is_usable(self) -> bool:
        """Whether the connection is open, has not broken while it was idle, and leads to the primary."""
        connection = self._connection
        if not (connection.is_open and self.is_current(connection)):
            return False
        is_idle = asyncio.get_running_loop().time() - self._used >= _STALE_AFTER
        return not (is_idle and await connection.has_ended())

    async def _open(self) -> None:
        async with asyncio.timeout(SOCKET_TIMEOUT) as self._deadline:
            await self._connection.open()
        self._breaks += 1
        self._on_break()
        self._watch_primary()

    # --- Sentinel: a primary that is replaced while it is only slow still answers, so it has to be noticed from outside

    def is_current(self, connection: Connection) -> bool:
        return self._primary is None or connection.address == self._primary

    def _watch_primary(self) -> None:
        if self._connection.has_sentinel:
            self._primary = self._connection.address
            if self._watch is None:
                self._watch = asyncio.get_running_loop().create_task(self._ask_sentinel(), name="agx-sentinel")

    async def _ask_sentinel(self) -> None:
        """Ask which server is the primary; where that changes, end what waits for the former one."""
        while True:
            await asyncio.sleep(_ASK_SENTINEL_EVERY)
            try:
                self._primary = await self._connection.find_primary()
            except Exception as error:  # whatever connecting to a Sentinel raises; asked again
                logger.debug("agx: no Sentinel names a primary (%s)", error)
                continue
            if not self.is_current(self._connection) and self._sender is not None and self._deadline is not None:
                with contextlib.suppress(RuntimeError):  # it is over
                    self._deadline.reschedule(asyncio.get_running_loop().time())

    async def make_subscriber(self) -> Connection:
        return self._make_connection()

    async def aclose(self) -> None:
        tasks = [task for task in (self._sender, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()


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
