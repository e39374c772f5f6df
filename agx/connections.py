"""The runtime's own connections to Redis: opened from the settings of the user's client, never taken from its pool."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

Client = Redis | RedisCluster
Arg = bytes | str | int | float
# A reply's shape depends on the command; each caller knows its own.
Reply = Any

CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)
CONNECT_TIMEOUT = 1.5  # seconds; below the 2 s in which a start has to fail
SOCKET_TIMEOUT = 5.0

# What a pool adds to its connections' settings for itself: another pool makes its own.
_POOL_OWN = ("maint_", "orig_", "oss_cluster_", "himport_registry", "connection_pool", "response_callbacks")


def open_client(source: Client) -> Client:
    """Return a new client with the settings of `source` (addresses, credentials, TLS, database) and our own policy.

    No retries: redis-py's silent ones repeat an append whose reply was lost. RESP2: one shape of replies, whatever the
    user's client speaks. Maintenance notifications need rights that a least-privilege user lacks, so they are off.
    """
    if isinstance(source, RedisCluster):
        return _open_cluster(source)
    pool = source.connection_pool
    kwargs = _settings(pool.connection_kwargs)
    if isinstance(pool, SentinelConnectionPool):
        manager = pool.sentinel_manager
        addresses = [
            (kw["host"], kw["port"])
            for kw in (client.connection_pool.connection_kwargs for client in manager.sentinels)
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
        return Redis.from_pool(managed)
    return Redis.from_pool(ConnectionPool(connection_class=pool.connection_class, **kwargs))


def _settings(theirs: dict[str, Any], *, drop: Sequence[str] = ()) -> dict[str, Any]:
    kept = {name: value for name, value in theirs.items() if not name.startswith(_POOL_OWN) and name not in drop}
    return kept | {
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


def _open_cluster(source: RedisCluster) -> RedisCluster:
    theirs = source.connection_kwargs
    kwargs = _settings(theirs)
    kwargs["ssl"] = issubclass(theirs.get("connection_class", object), SSLConnection)
    accepted = inspect.signature(RedisCluster.__init__).parameters
    nodes = [ClusterNode(node.host, node.port) for node in source.startup_nodes]
    return RedisCluster(
        startup_nodes=nodes,
        **{name: value for name, value in kwargs.items() if name in accepted and name not in ("host", "port")},
    )


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script on one key; sent by its hash."""

    source: str

    @property
    def digest(self) -> str:
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class _Call:
    args: tuple[Arg, ...]
    reply: asyncio.Future[Reply]
    script: tuple[Script, tuple[Arg, ...]] | None


class Bus:
    """One connection (one per node of a cluster) that all commands of a kind share.

    Commands that are issued while a round trip is under way leave together in the next one, so a thousand callers cost
    as many round trips as one. Nothing is repeated here: whoever issues a command knows whether it may be sent again.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: list[_Call] = []
        self._sender: asyncio.Task[None] | None = None
        self._digests: dict[Script, str] = {}
        # Goes up with every broken connection: "unbroken since" is a comparison.
        self.breaks = 0

    def execute(self, *args: Arg) -> asyncio.Future[Reply]:
        """Issue a command; the future has its reply, or a RedisError. Synchronous up to there."""
        return self._issue(args, None)

    def run(self, script: Script, key: str, *args: Arg) -> asyncio.Future[Reply]:
        """Issue a script on one key; loads it where the server does not know it yet."""
        digest = self._digests.get(script)
        if digest is None:
            digest = self._digests[script] = script.digest
        return self._issue(("EVALSHA", digest, 1, key, *args), (script, (key, *args)))

    def _issue(self, args: tuple[Arg, ...], script: tuple[Script, tuple[Arg, ...]] | None) -> asyncio.Future[Reply]:
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        # A caller that is cancelled never fetches it: no "exception was never retrieved".
        reply.add_done_callback(_retrieve)
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
                    for call in calls:
                        if not call.reply.done():
                            call.reply.set_exception(
                                RedisConnectionError("the runtime is closing")
                                if isinstance(error, asyncio.CancelledError)
                                else error
                            )
                    if not isinstance(error, (RedisError, OSError)):
                        raise
                    if isinstance(error, CONNECTION_ERRORS):
                        self.breaks += 1
        finally:
            self._sender = None
            leftover, self._waiting = self._waiting, []
            for call in leftover:
                if not call.reply.done():
                    call.reply.set_exception(RedisConnectionError("the runtime is closing"))

    async def _round_trip(self, calls: list[_Call]) -> None:
        pipe = self._client.pipeline(transaction=False)
        for call in calls:
            pipe.execute_command(*call.args)
        replies = await pipe.execute(raise_on_error=False)
        for call, reply in zip(calls, replies, strict=True):
            if isinstance(reply, NoScriptError) and call.script is not None:
                script, args = call.script
                self._waiting.append(_Call(("EVAL", script.source, 1, *args), call.reply, None))
            elif call.reply.done():
                continue
            elif isinstance(reply, BaseException):
                # A cluster reports a broken node command by command.
                self.breaks += isinstance(reply, CONNECTION_ERRORS)
                call.reply.set_exception(reply)
            else:
                call.reply.set_result(reply)

    async def aclose(self) -> None:
        """Stop sending and close the connections; what was waiting fails."""
        if (sender := self._sender) is not None:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        await self._client.aclose()


def _retrieve(reply: asyncio.Future[Reply]) -> None:
    if not reply.cancelled():
        reply.exception()
