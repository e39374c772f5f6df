"""The adapter for redis-py and hiredis: whatever of them is private or undocumented is used in this file only.

In: the user's client, of which only the settings are used. Out: connections of our own, under our policy (contract,
section 3). `tests/contract/test_redis_py.py` fails where a release changes one of the things used here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from redis.exceptions import InvalidResponse, RedisError

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
        self._receiver: _Receiver | None = None  # from `receive()` to the end of the connection

    @property
    def is_open(self) -> bool:
        """Whether `receive()` was called, and the connection has not ended since."""
        return self._receiver is not None

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
        self._receiver = None
        try:
            await self._raw.disconnect()
            self._raw.socket_timeout = SOCKET_TIMEOUT
            await self._raw.connect()  # type: ignore[no-untyped-call]
            # With it redis-py makes a task and a timer for each send, and loses a cancellation before Python 3.12.
            self._raw.socket_timeout = None
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

    def receive(self, on_received: Callable[[], None], on_lost: Callable[[BaseException], None]) -> None:
        """Receive replies by callbacks: `on_received()`, after which `take_received()` has them, and `on_lost(error)`.

        redis-py's stream and its coroutines use more CPU than the rest of the round trip.
        """
        writer: asyncio.StreamWriter | None = getattr(self._raw, "_writer", None)
        parse_error = getattr(getattr(self._raw, "_parser", None), "parse_error", None)
        if writer is None or parse_error is None:
            raise RedisConnectionError(f"redis-py {redis.__version__} can't be used: install an older version")
        transport, redis_protocol = writer.transport, writer.transport.get_protocol()
        reader = hiredis.Reader(protocolError=InvalidResponse, replyError=parse_error, notEnoughData=NO_REPLY)
        self._receiver = _Receiver(self, transport, reader, redis_protocol, on_received, on_lost)
        transport.set_protocol(self._receiver)

    def take_received(self) -> Reply:
        """Return the next reply, which may be a RedisError, if it has arrived; else `NO_REPLY`."""
        return NO_REPLY if self._receiver is None else self._receiver.reader.gets()

    def write(self, packed: bytes) -> None:
        """Send commands whose replies are received by callbacks."""
        assert self._receiver is not None
        self._receiver.transport.write(packed)

    def abort(self) -> None:
        """Close the socket at once, without a further callback; `open()` connects again."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.transport.abort()

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


@dataclass(eq=False)
class _Receiver(asyncio.Protocol):
    """Passes the bytes that a server sends to hiredis' reader, instead of to redis-py's stream."""

    connection: Connection
    transport: asyncio.WriteTransport
    reader: hiredis.Reader
    redis_protocol: asyncio.BaseProtocol
    on_received: Callable[[], None]
    on_lost: Callable[[BaseException], None]

    def data_received(self, data: bytes) -> None:
        if self.connection._receiver is self:
            self.reader.feed(data)
            self.on_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.redis_protocol.connection_lost(exc)  # `close()` of redis-py's writer waits for this call
        if self.connection._receiver is self:
            self.connection._receiver = None
            self.on_lost(RedisConnectionError(f"the connection was closed: {exc or 'by the server'}"))


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
