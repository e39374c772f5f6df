"""The sidecar on a cluster, behind Sentinel, and with TLS and a user who may do no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis, RedisCluster
from redis.cluster import ClusterNode
from redis.exceptions import RedisError
from support.made_facts import ended, node, started, tool
from support.otlp import OtlpReceiver
from support.replica import Queue, Replica, StartReplica
from support.rigs import ClusterRig, SentinelRig, TlsRig, cluster_rig, sentinel_rig, tls_rig
from support.waiting import wait_until_sync

from agx.facts.schema import Fact
from agx.redis import keys


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterRig]:
    with cluster_rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def sentinel() -> Iterator[SentinelRig]:
    with sentinel_rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def tls() -> Iterator[TlsRig]:
    with tls_rig() as rig:
        yield rig


def some_runs(name: str, count: int) -> list[Fact]:
    facts: list[Fact] = []
    for n in range(count):
        run_id, scope = f"{name}-{n}", {"scope": f"scope-{n % 7}"}
        facts += [started(run_id, **scope), node(run_id, **scope), tool(run_id, **scope), ended(run_id, **scope)]
    return facts


def wait_for(replica: Replica, otlp: OtlpReceiver, count: int) -> None:
    """Wait for the metrics and the traces of so many runs."""
    wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == count, what=f"{count} runs counted")
    wait_until_sync(lambda: len({(s.name, s.attributes["agx.run.id"]) for s in otlp.spans}) == 4 * count)


def traced(otlp: OtlpReceiver) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint_http}


def patiently(add: Callable[[], None]) -> None:
    """Add facts while a primary is being replaced; services do so with their own retries, and repeats are known."""

    def attempt() -> bool:
        try:
            add()
        except (RedisError, OSError):
            return False
        return True

    wait_until_sync(attempt, what="facts are taken")


def test_on_a_cluster_through_a_failover(cluster: ClusterRig, start_sidecar: StartReplica, otlp: OtlpReceiver) -> None:
    cluster.flush()
    nodes = [ClusterNode(host, port) for host, port in cluster.nodes]
    with RedisCluster(startup_nodes=nodes) as client:
        queue = Queue(client, partitions=8)
        queue.add(*some_runs("a", 20))
        replica = start_sidecar(cluster.url, **traced(otlp))
        wait_for(replica, otlp, 20)
        killed = cluster.primary_of(keys.leader("agx"))
        killed.kill()
        patiently(lambda: queue.add(*some_runs("b", 20)))
        wait_for(replica, otlp, 40)
        killed.start()
        wait_until_sync(cluster.is_whole)
        assert "Traceback" not in replica.log
        assert replica.end() == 0


def test_behind_sentinel_through_a_failover(
    sentinel: SentinelRig, start_sidecar: StartReplica, otlp: OtlpReceiver
) -> None:
    sentinel.flush()
    with Redis(port=sentinel.primary().port) as client:
        Queue(client).add(*some_runs("a", 20))
    replica = start_sidecar(sentinel.url, **traced(otlp))
    wait_for(replica, otlp, 20)
    killed = sentinel.primary()
    killed.kill()
    wait_until_sync(lambda: sentinel.primary() is not killed)

    def add() -> None:
        with Redis(port=sentinel.primary().port) as client:
            Queue(client).add(*some_runs("b", 20))

    patiently(add)
    wait_for(replica, otlp, 40)
    killed.start()
    assert "Traceback" not in replica.log


@pytest.mark.redis7
def test_with_tls_and_a_user_of_least_privilege(tls: TlsRig, start_sidecar: StartReplica, otlp: OtlpReceiver) -> None:
    rule = (
        "~agx:* &agx:* resetchannels -@all +@connection +info +ping +time +eval +get +set +del +getrange +setrange "
        "+expire +pexpire +pttl +hgetall +xread +xinfo +xrange +xrevrange +xreadgroup +xack +xautoclaim +xpending "
        "+xgroup +zrangebyscore +xadd +hkeys"
    )
    tls.set_users({"sidecar": rule})
    with tls.admin() as admin:
        admin.flushall()
        queue = Queue(admin)
        queue.add(*some_runs("a", 10))
        wrong = start_sidecar(tls.url("nobody"), AGX_REDIS_CA=str(tls.ca))
        wait_until_sync(lambda: "Redis can't be reached" in wrong.log)
        assert wrong.get("/readyz")[0] == 503
        assert "nobody:nobody" not in wrong.log + wrong.get("/readyz")[1]
        replica = start_sidecar(tls.url("sidecar"), AGX_REDIS_CA=str(tls.ca), **traced(otlp))
        wait_for(replica, otlp, 10)
        assert "refused" not in replica.log
        assert replica.end() == 0
        assert "refused" not in replica.log
        assert admin.exists(keys.metrics("agx"))
