"""redis-py clients of our own, with the settings of the user's client and our policy (contract, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

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


def open_client(source: Redis) -> Redis:
    """Return a new client with the settings of `source`: addresses, credentials, TLS, database; Sentinel too."""
    pool = source.connection_pool
    kwargs = _settings(pool.connection_kwargs)
    if not isinstance(pool, SentinelConnectionPool):
        return Redis.from_pool(ConnectionPool(connection_class=pool.connection_class, **kwargs))
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
    return Redis.from_pool(managed)


async def close_client(client: Redis) -> None:
    """Close a client of ours, with the connections to Sentinels that redis-py leaves open."""
    await client.aclose()
    if isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def open_node_client(source: RedisCluster, host: str, port: int) -> Redis:
    """Return a new client of one node of a cluster, with the settings of `source`."""
    theirs = source.connection_kwargs
    kwargs = _settings(theirs, drop=("host", "port", "db"))
    connection_class = theirs.get("connection_class", Connection)
    return Redis.from_pool(ConnectionPool(connection_class=connection_class, host=host, port=port, **kwargs))


def _settings(theirs: Mapping[str, Any], *, drop: Sequence[str] = ()) -> dict[str, Any]:
    """Return a connection's settings under our policy.

    No retries: redis-py's silent ones repeat an append whose reply was lost. RESP2: one shape of replies, whatever the
    user's client speaks. Maintenance notifications need rights that a least-privilege user lacks, so they are off.
    """
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
