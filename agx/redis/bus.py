"""The runtime's own connections to Redis: a bus is one connection that all commands of a kind share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .redis_py import NO_REPLY, SOCKET_TIMEOUT, Address, Arg, Connection, Reply, pack_command

logger = logging.getLogger("agx")

CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

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
    def execute(self, *args: Arg, as_sent: bool = False) -> asyncio.Future[Reply]:
        """Issue a command; the future has its reply, or a RedisError. Synchronous up to there.

        With `as_sent` the reply has the shape that the protocol gives it, without the work of redis-py: the fields of
        an entry are a flat list.
        """

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
    name: Arg
    packed: bytes
    reply: asyncio.Future[Reply]
    script: tuple[Script, tuple[Arg, ...]] | None
    as_sent: bool = False


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
        self._waiting: list[_Call] = []
        self._under_way: deque[_Call] = deque()  # sent; their replies come in this order
        self._is_busy = False  # a round trip is under way, or about to begin
        self._is_replica = False  # as a reply of this round trip shows
        self._sent = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self._deadline: asyncio.Timeout | None = None  # of the opening
        self._breaks = 0
        self._primary: Address | None = None  # that Sentinel named last
        self._watch: asyncio.Task[None] | None = None

    @property
    def breaks(self) -> int:
        return self._breaks

    def execute(self, *args: Arg, as_sent: bool = False) -> asyncio.Future[Reply]:
        return self._issue(args, None, as_sent)

    def run(self, script: Script, key: str, *args: Arg) -> asyncio.Future[Reply]:
        return self._issue(("EVALSHA", script.digest, 1, key, *args), (script, (key, *args)), as_sent=True)

    def _issue(
        self, args: tuple[Arg, ...], script: tuple[Script, tuple[Arg, ...]] | None, as_sent: bool
    ) -> asyncio.Future[Reply]:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        try:
            packed = pack_command(args)
        except Exception as error:  # an argument is of another type, or a lone surrogate: no other call fails with it
            logger.exception("agx: a command could not be sent")
            fail_reply(reply, error)
            return reply
        self._waiting.append(_Call(args[0], packed, reply, script, as_sent))
        if not self._is_busy:
            self._is_busy = True
            loop.call_soon(self._send)
        return reply

    # --- a round trip: callbacks, because a task and its coroutines use more CPU than the rest of it

    def _send(self) -> None:
        """Send the commands that wait. Commands issued from now on wait until all replies have been received."""
        if self._under_way or self._opening is not None:
            return  # `_issue()` had scheduled this call, and a lost connection has sent the commands already
        calls, self._waiting = self._waiting, []
        self._is_busy = bool(calls)
        if not calls:
            return
        loop, connection = asyncio.get_running_loop(), self._connection
        if not (connection.is_open and self.is_current(connection)):
            self._opening = loop.create_task(self._open(calls), name="agx-bus")
            return
        self._under_way.extend(calls)
        self._sent = loop.time()
        if self._timer is None:
            self._timer = loop.call_at(self._sent + SOCKET_TIMEOUT, self._check_deadline)
        connection.write(b"".join([call.packed for call in calls]))

    def _on_received(self) -> None:
        """Settle the calls whose replies have come, and begin the next round trip after the last one."""
        try:
            while (reply := self._connection.take_received()) is not NO_REPLY:
                if not self._under_way:
                    raise RedisConnectionError("the server sent a reply without a command")
                self._settle(self._under_way[0], reply)
                self._under_way.popleft()
        except RedisError as error:
            self._give_up(error)
        except Exception as error:
            logger.exception("agx: a reply could not be read")
            self._give_up(error)
        if self._under_way or not self._is_busy:
            return
        if self._is_replica:
            # The name by which it was found may lead to another server by now.
            self._is_replica = False
            self._connection.abort()
        self._send()

    def _settle(self, call: _Call, reply: Reply) -> None:
        """Give a call its reply; raises an error after which the next replies can't be trusted."""
        if isinstance(reply, NoScriptError) and call.script is not None:
            script, args = call.script
            command = ("EVAL", script.source, 1, *args)
            self._waiting.append(_Call(command[0], pack_command(command), call.reply, None))
        elif isinstance(reply, (ReadOnlyError, MasterDownError)):
            self._is_replica = True
            fail_reply(call.reply, RedisConnectionError(f"the server is a replica: {reply}"))
        elif isinstance(reply, ResponseError):
            fail_reply(call.reply, reply)
        elif isinstance(reply, RedisError):
            raise reply
        elif not call.reply.done():
            call.reply.set_result(reply if call.as_sent else self._connection.parse(call.name, reply))

    def _check_deadline(self) -> None:
        # One timer for many round trips: a round trip sets only `_sent`, and the timer computes its deadline from that.
        self._timer = None
        if self._under_way:
            loop, due = asyncio.get_running_loop(), self._sent + SOCKET_TIMEOUT
            if loop.time() >= due:
                self._on_lost(TimeoutError("no reply"))
            else:
                self._timer = loop.call_at(due, self._check_deadline)

    def _on_lost(self, error: BaseException) -> None:
        """Handle a connection that was closed, or that can no longer be used."""
        self._give_up(error)
        if self._is_busy and self._opening is None:
            self._send()

    def _give_up(self, error: BaseException) -> None:
        """Close the connection: replies that were not read would be taken for those of the next commands."""
        self._connection.abort()
        calls = list(self._under_way)
        self._under_way.clear()
        _fail(calls, error)

    async def _open(self, calls: list[_Call]) -> None:
        try:
            async with asyncio.timeout(SOCKET_TIMEOUT) as self._deadline:
                await self._connection.open()
            self._connection.receive(self._on_received, self._on_lost)
            self._breaks += 1
            self._waiting[:0] = calls
            calls = []
            self._on_break()
            self._watch_primary()
        except (RedisError, OSError) as error:
            _fail(calls, error)
        except Exception as error:
            logger.exception("agx: a connection could not be opened")
            _fail(calls, error)
        except BaseException:
            _fail(calls, _closing())
            raise
        finally:
            self._opening = None
        self._send()

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
            if self.is_current(self._connection):
                continue
            if self._opening is not None and self._deadline is not None:
                with contextlib.suppress(RuntimeError):  # it is over
                    self._deadline.reschedule(asyncio.get_running_loop().time())
            elif self._under_way:
                self._on_lost(RedisConnectionError("the server was replaced"))

    async def make_subscriber(self) -> Connection:
        return self._make_connection()

    async def aclose(self) -> None:
        tasks = [task for task in (self._opening, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        waiting, self._waiting = self._waiting, []
        self._is_busy = False
        self._give_up(_closing())
        _fail(waiting, _closing())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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
