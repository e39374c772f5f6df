"""The Redis topologies that agx supports besides a single server: for each a client, and the sidecar's settings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from redis import Redis as SyncRedis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import Sentinel

import agx

from .leaks import lasting_keys
from .rigs import MASTER, ClusterRig, SentinelRig, TlsRig


@dataclass(frozen=True)
class Topology:
    """One topology: `open` makes a client for agx, `admins` clients that together see every key."""

    name: str
    open: Callable[[], Redis | RedisCluster]
    admins: Callable[[], list[SyncRedis]]
    environment: Mapping[str, str] = field(default_factory=dict)


def cluster_topology(rig: ClusterRig) -> Topology:
    nodes = [ClusterNode(host, port) for host, port in rig.nodes[:3]]
    return Topology(
        "cluster",
        lambda: RedisCluster(startup_nodes=nodes),
        lambda: [SyncRedis(port=server.port) for server in rig.primaries()],
        {"redis_url": rig.url},
    )


def sentinel_topology(rig: SentinelRig) -> Topology:
    def open_client() -> Redis:
        client: Redis = Sentinel(rig.sentinels).master_for(MASTER)  # type: ignore[no-untyped-call] # redis-py has none
        return client

    return Topology("sentinel", open_client, lambda: [SyncRedis(port=rig.primary().port)], {"redis_url": rig.url})


def tls_topology(rig: TlsRig, user: str = "admin") -> Topology:
    return Topology(
        "tls",
        lambda: Redis.from_url(rig.url(user), ssl_ca_certs=str(rig.ca)),
        lambda: [rig.admin()],
        {"redis_url": rig.url(user), "AGX_REDIS_CA": str(rig.ca)},
    )


@asynccontextmanager
async def configured_on(topology: Topology, *, lease_ttl: float = 15.0) -> AsyncIterator[None]:
    """Configure agx on an emptied topology; fail afterwards if a key without a TTL is left."""
    for admin in topology.admins():
        with admin:
            admin.flushall()
    client = topology.open()
    agx.configure(agx.Config(redis=client, lease_ttl=lease_ttl))
    yield
    await agx.aclose()
    await client.aclose()
    for admin in topology.admins():
        with admin:
            assert not lasting_keys(admin)
