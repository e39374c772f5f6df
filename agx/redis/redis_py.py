"""The adapter for redis-py and hiredis: whatever of them is private or undocumented is used in this file only.

In: the user's client, of which only the settings are used. Out: connections of our own, under our policy (contract,
section 3). `tests/contract/test_redis_py.py` fails where a release changes one of the things used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import hiredis
import redis
from redis import DriverInfo
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import Connection as RedisPyConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

Arg = bytes | str | int | float
# A reply's shape depends on the command; each caller has its own type.
Reply = Any
Address = tuple[str, int]

NO_REPLY = object()

SOCKET_TIMEOUT = 5.0  # seconds for the replies of a round trip
CONNECT_TIMEOUT = 1.5  # seconds; below the 2 s in which a start has to fail

# What a pool or a cluster adds to its connections' settings for itself: another one makes its own.
_POOL_OWN = (
    "maint_",
    "orig_",
    "oss_cluster_",
    "himport_registry",
    "connection_pool",
    "connection_class",
    "response_callbacks",
)


# Returns a command as the protocol sends it; hiredis takes 1 us for that, redis-py 15.
pack_command: Callable[[tuple[Arg, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment] # its stub is wrong


class Connection:
    """One connection to one server. Whatever is raised while it connects is a RedisError or an OSError."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._raw: RedisPyConnection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        # Reads one reply, without a deadline of its own: one deadline for all replies of a round trip is one timer.
        self.read: Callable[[], Awaitable[Reply]] = partial(self._raw.read_response, timeout=math.inf)
        self._received: hiredis.Reader | None = None  # has the replies that have arrived
        self._nothing: object = None  # its answer where it has none

    @property
    def is_open(self) -> bool:
        return bool(self._raw.is_connected)

    @property
    def address(self) -> Address | None:
        """The server's address as of the last connection; None for a unix socket."""
        host = getattr(self._raw, "host", None)
        return None if not host else (str(host), int(self._raw.port))

    async def open(self) -> None:
        """Connect anew: TCP, TLS, credentials, database.

        Raises:
            RedisError, OSError: it failed; the connection is closed. An exception of another kind (of a credential
                provider, an address mapper, TLS settings) is the cause of a redis.exceptions.ConnectionError.
        """
        try:
            await self._raw.disconnect()
            self._raw.socket_timeout = SOCKET_TIMEOUT
            await self._raw.connect()  # type: ignore[no-untyped-call]
            # With it redis-py makes a task and a timer for each send, and loses a cancellation before Python 3.12.
            self._raw.socket_timeout = None
            self._find_received()
        except BaseException as error:
            # After an error that is no RedisError redis-py leaves a connection open that is neither authenticated nor
            # on the right database, and takes it for a good one.
            await self.close_socket()
            if isinstance(error, (RedisError, OSError)):
                raise
            task = asyncio.current_task()
            was_cancelled = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()
            if was_cancelled or not isinstance(error, (Exception, asyncio.CancelledError)):
                raise
            raise RedisConnectionError(f"connecting failed: {type(error).__name__}: {error}") from error

    def _find_received(self) -> None:
        """Find the parser's buffer; without it each reply costs five calls more."""
        reader = getattr(getattr(self._raw, "_parser", None), "_reader", None)
        nothing = reader.gets() if isinstance(reader, hiredis.Reader) else None
        self._received, self._nothing = (reader, nothing) if type(nothing) is object else (None, None)

    def take_received(self) -> Reply:
        """Return the next reply if it has arrived already, else `NO_REPLY`; raises RedisError where the reply is one.

        Replies of a round trip arrive together, and `read()` takes five calls for each.
        """
        reply = self._nothing if self._received is None else self._received.gets()
        if reply is self._nothing:
            return NO_REPLY
        if isinstance(reply, RedisError):
            raise reply
        return reply

    async def send(self, packed: bytes) -> None:
        """Send commands, without a deadline; raises RedisError or OSError."""
        await self._raw.send_packed_command(packed, check_health=False)

    async def read_message(self) -> Reply:
        """Wait for a pushed message. A read that is cancelled, between two messages or within one, loses nothing."""
        return await self._raw.read_response(timeout=math.inf, disconnect_on_error=False)

    async def has_ended(self) -> bool:
        """Whether the server closed an idle connection, or sent what nobody asked for, which is its reason to."""
        try:
            return bool(await self._raw.can_read())
        except (RedisError, OSError):
            return True

    def parse(self, command: Arg, reply: Reply) -> Reply:
        """Return a command's reply in the shape that redis-py's users know."""
        callback = self._client.response_callbacks.get(str(command))
        return reply if callback is None else callback(reply)

    async def find_primary(self) -> Address | None:
        """Return the address of the primary that Sentinel names now; None where there is no Sentinel.

        Raises:
            RedisError, OSError: no Sentinel answers, or none has a primary.
        """
        pool = self._client.connection_pool
        if not isinstance(pool, SentinelConnectionPool):
            return None
        host, port = await pool.get_master_address()  # type: ignore[no-untyped-call]
        return str(host), int(port)

    @property
    def has_sentinel(self) -> bool:
        return isinstance(self._client.connection_pool, SentinelConnectionPool)

    async def close_socket(self) -> None:
        """Close the socket; `open()` connects again."""
        with contextlib.suppress(RedisError, OSError):
            await self._raw.disconnect(nowait=True)

    async def close(self) -> None:
        """Close the connection for good, with those to Sentinels that redis-py leaves open."""
        with contextlib.suppress(RedisError, OSError):
            await self._raw.disconnect()
        await self._client.aclose()
        if isinstance(pool := self._client.connection_pool, SentinelConnectionPool):
            for sentinel in pool.sentinel_manager.sentinels:
                await sentinel.aclose()


def make_connection(source: Redis) -> Connection:
    """Return a connection with the settings of `source`: addresses, credentials, TLS, database; Sentinel too."""
    pool = source.connection_pool
    kwargs = _settings(pool.connection_kwargs)
    if not isinstance(pool, SentinelConnectionPool):
        return Connection(Redis.from_pool(ConnectionPool(connection_class=pool.connection_class, **kwargs)))
    manager = pool.sentinel_manager
    addresses = [
        (kw["host"], kw["port"]) for kw in (client.connection_pool.connection_kwargs for client in manager.sentinels)
    ]
    ours = Sentinel(  # type: ignore[no-untyped-call] # redis-py has no types here
        addresses,
        min_other_sentinels=manager.min_other_sentinels,
        sentinel_kwargs={
            **_settings(manager.sentinels[0].connection_pool.connection_kwargs, drop=("host", "port")),
            "socket_timeout": CONNECT_TIMEOUT,
        },
    )
    kwargs["connection_class"] = pool.connection_class
    managed = SentinelConnectionPool(pool.service_name, ours, **kwargs)  # type: ignore[no-untyped-call]
    return Connection(Redis.from_pool(managed))


def make_node_connection(source: RedisCluster, host: str, port: int) -> Connection:
    """Return a connection to one node of a cluster, with the settings of `source`."""
    theirs = source.connection_kwargs
    kwargs = _settings(theirs, drop=("host", "port", "db"))
    connection_class = theirs.get("connection_class", RedisPyConnection)
    pool = ConnectionPool(connection_class=connection_class, host=host, port=port, **kwargs)
    return Connection(Redis.from_pool(pool))


def startup_addresses(source: RedisCluster) -> list[Address]:
    """Return the nodes of a cluster that the user named."""
    return [(str(node.host), int(node.port)) for node in source.startup_nodes]


def remap_address(source: RedisCluster, host: str, port: int) -> Address:
    """Return where a node can be reached that its cluster names so; raises redis.exceptions.ConnectionError."""
    try:
        remapped: Address = source.nodes_manager.remap_host_port(host, port)
    except Exception as error:  # of the user's `address_remap`
        raise RedisConnectionError(f"address_remap failed: {type(error).__name__}: {error}") from error
    return remapped


def _settings(theirs: Mapping[str, Any], *, drop: Sequence[str] = ()) -> dict[str, Any]:
    """Return a connection's settings under our policy.

    No retries: redis-py's silent ones repeat an append whose reply was lost. RESP2: one shape of replies, whatever the
    user's client speaks. Maintenance notifications need rights that a least-privilege user lacks, so they are off.
    """
    settings = {name: value for name, value in theirs.items() if not name.startswith(_POOL_OWN) and name not in drop}
    if "driver_info" not in settings:
        # Without a version redis-py reads its own from files, in the event loop, at each connection.
        name, version = settings.pop("lib_name", "redis-py"), settings.pop("lib_version", redis.__version__)
        settings["driver_info"] = DriverInfo(name=name, lib_version=version)
    return settings | {
        "decode_responses": False,
        "encoding": "utf-8",
        "protocol": 2,
        "legacy_responses": True,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "health_check_interval": 0,
    }
