"""The engines that agx claims besides a single server: each with a client for agx and the sidecar's environment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import Sentinel
from support.leaks import lasting_keys
from support.rigs import (
    MASTER,
    ClusterRig,
    SentinelRig,
    TlsRig,
    cluster_rig,
    sentinel_rig,
    tls_rig,
)

import agx

RedisClient = Redis | RedisCluster


@dataclass(frozen=True)
class Place:
    """One engine: `open` makes a client for agx, `admins` clients that see every key."""

    name: str
    open: Callable[[], RedisClient]
    admins: Callable[[], list[SyncRedis]]
    environment: Mapping[str, str] = field(default_factory=dict)


@pytest.fixture(scope="session")
def cluster() -> Iterator[ClusterRig]:
    with cluster_rig() as rig:
        yield rig


@pytest.fixture(scope="session")
def sentinel() -> Iterator[SentinelRig]:
    with sentinel_rig() as rig:
        yield rig


@pytest.fixture(scope="session")
def tls() -> Iterator[TlsRig]:
    with tls_rig() as rig:
        yield rig


def cluster_place(rig: ClusterRig) -> Place:
    nodes = [ClusterNode(host, port) for host, port in rig.nodes[:3]]
    return Place(
        "cluster",
        lambda: RedisCluster(startup_nodes=nodes),
        lambda: [SyncRedis(port=server.port) for server in rig.primaries()],
        {"redis_url": rig.url},
    )


def sentinel_place(rig: SentinelRig) -> Place:
    def open_client() -> Redis:
        client: Redis = Sentinel(rig.sentinels).master_for(MASTER)  # type: ignore[no-untyped-call] # redis-py has none
        return client

    return Place("sentinel", open_client, lambda: [SyncRedis(port=rig.primary().port)], {"redis_url": rig.url})


def tls_place(rig: TlsRig, user: str = "admin") -> Place:
    return Place(
        "tls",
        lambda: Redis.from_url(rig.url(user), ssl_ca_certs=str(rig.ca)),
        lambda: [rig.admin()],
        {"redis_url": rig.url(user), "AGX_REDIS_CA": str(rig.ca)},
    )


@pytest.fixture(params=["cluster", "sentinel", pytest.param("tls", marks=pytest.mark.redis7)])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each engine in turn, empty, with agx configured on it; nothing without a TTL may be left."""
    rig = request.getfixturevalue(request.param)
    match rig:
        case ClusterRig():
            place = cluster_place(rig)
        case SentinelRig():
            place = sentinel_place(rig)
        case _:
            place = tls_place(rig)
    async for _ in configured_on(place):
        yield place


async def configured_on(place: Place) -> AsyncIterator[None]:
    """Configure agx on an emptied engine, and look for leaks afterwards."""
    for admin in place.admins():
        with admin:
            admin.flushall()
    client = place.open()
    agx.configure(agx.Config(redis=client))
    yield
    await agx.aclose()
    await client.aclose()
    for admin in place.admins():
        with admin:
            assert not lasting_keys(admin)
