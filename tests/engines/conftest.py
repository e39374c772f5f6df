"""Fixtures of the topologies' tests: a cluster, Sentinel and Redis 7.0 with TLS, started once per worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from support.rigs import ClusterRig, SentinelRig, TlsRig, cluster_rig, sentinel_rig, tls_rig
from support.topologies import Topology, cluster_topology, configured_on, sentinel_topology, tls_topology


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


@pytest.fixture(params=["cluster", "sentinel", pytest.param("tls", marks=pytest.mark.redis7)])
async def topology(request: pytest.FixtureRequest) -> AsyncIterator[Topology]:
    """Each topology in turn, empty, with agx configured on it; nothing without a TTL may be left."""
    rig = request.getfixturevalue(request.param)
    match rig:
        case ClusterRig():
            topology = cluster_topology(rig)
        case SentinelRig():
            topology = sentinel_topology(rig)
        case _:
            topology = tls_topology(rig)
    async with configured_on(topology):
        yield topology
