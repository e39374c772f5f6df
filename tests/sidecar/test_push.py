"""Metrics pushed over OTLP: the cells of /metrics, cumulative, and exact when another replica takes over."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.resources import Resource
from support.made_facts import T0, ended, node, started, tool
from support.otlp import OtlpReceiver, ReceivedPoint
from support.replica import Queue, StartReplica
from support.waiting import wait_until_sync

from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.series import Sample
from agx_sidecar.push.encoding import describe, fleet_resource
from agx_sidecar.semconv import SHOWN

RUNS = 40


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def environment(collector: OtlpReceiver, protocol: str = "http/protobuf") -> dict[str, str]:
    return {
        "AGX_METRICS_EXPORT": "otlp",
        "OTEL_METRIC_EXPORT_INTERVAL": "100",
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": collector.endpoint_grpc
        if protocol == "grpc"
        else f"{collector.endpoint_http}/v1/metrics",
    }


def run_facts(n: int) -> list:  # type: ignore[type-arg]
    run_id = f"run-{n}"
    return [started(run_id), node(run_id), tool(run_id), ended(run_id, end_ns=T0 + n)]


def latest(collector: OtlpReceiver, name: str, **attributes: str) -> ReceivedPoint | None:
    found = [p for p in list(collector.points) if p.name == name and attributes.items() <= p.attributes.items()]
    return found[-1] if found else None


def completed(collector: OtlpReceiver) -> float:
    point = latest(collector, "agx_runs_total", outcome="completed")
    return 0 if point is None else point.value


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_leader_pushes_what_it_exports(
    collector: OtlpReceiver, queue: Queue, start_replica: StartReplica, protocol: str
) -> None:
    queue.add(*run_facts(1), *run_facts(2))
    replica = start_replica(**environment(collector, protocol))
    wait_until_sync(lambda: completed(collector) == 2)
    # Under load a leader may lose its lease for a moment, and then shows nothing of the fleet.
    seconds = wait_until_sync(lambda: replica.scrape().total("gen_ai_client_operation_duration_seconds_sum"))
    point = latest(collector, "gen_ai.client.operation.duration")
    assert point is not None
    assert (point.unit, sum(point.counts)) == ("s", 2)
    assert point.bounds == tuple(bound / 1e9 for bound in i.OPERATION_DURATION.buckets)
    assert point.value == seconds
    assert point.attributes["gen_ai.agent.name"] == "support"
    assert 0 < point.start_ns <= point.time_ns
    assert "service.instance.id" not in point.resource
    own = latest(collector, "agx_sidecar_leader")
    assert own is not None
    assert (own.kind, own.value, bool(own.resource["service.instance.id"])) == ("gauge", 1, True)


def test_a_takeover_changes_no_series(collector: OtlpReceiver, queue: Queue, start_replica: StartReplica) -> None:
    replicas = [start_replica(**environment(collector)) for _ in range(2)]
    for n in range(RUNS):
        queue.add(*run_facts(n))
        if n == RUNS // 2:
            wait_until_sync(lambda: completed(collector) > 0)
            next(each for each in replicas if each.leads()).end(signal.SIGKILL)
    wait_until_sync(lambda: completed(collector) == RUNS, timeout=30)
    fleet = [p for p in collector.points if "service.instance.id" not in p.resource and p.kind != "gauge"]
    assert len({p.start_ns for p in fleet}) == 1
    highest: dict[tuple[object, ...], float] = {}
    for point in fleet:
        assert point.value >= highest.get(point.identity, 0), point
        highest[point.identity] = point.value
    duration = latest(collector, "agx_run_duration_seconds", outcome="completed")
    assert duration is not None
    assert (sum(duration.counts), duration.value) == (RUNS, sum(range(RUNS)) / 1e9)


def test_a_collector_that_fails_costs_no_count(
    collector: OtlpReceiver, queue: Queue, start_replica: StartReplica
) -> None:
    collector.fail_with(400)
    queue.add(*run_facts(1))
    replica = start_replica(**environment(collector))
    wait_until_sync(lambda: "the metrics could not be pushed: HTTP status 400" in replica.log)
    assert replica.get("/readyz")[0] == 200
    collector.recover()
    wait_until_sync(lambda: completed(collector) == 1)


def test_what_names_a_replica_is_not_in_the_fleets_resource() -> None:
    own = Resource({"service.name": "s", "service.instance.id": "a", "k8s.pod.name": "p", "k8s.cluster.name": "c"})
    assert dict(fleet_resource(own).attributes) == {"service.name": "s", "k8s.cluster.name": "c"}


def test_a_start_is_never_after_its_point() -> None:
    described = describe(Resource({}), {i.RUNS_LIVE: [Sample(("",), 1)]}, start_ns=9, now_ns=5)
    (metric,) = described.scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert (point.time_unix_nano, point.start_time_unix_nano) == (5, 0)
    assert dict(point.attributes or {}) == {}
    described = describe(Resource({}), {i.RUNS: [Sample(("a", "b", "c", ""), 1)]}, start_ns=9, now_ns=5)
    (point,) = described.scope_metrics[0].metrics[0].data.data_points
    assert point.start_time_unix_nano == 5


def test_a_collector_makes_the_names_of_metrics_from_the_pushed_ones() -> None:
    """It writes dots as underscores, the unit `s` as seconds, `USD` as it is, nothing for a unit in braces."""
    suffixes = {"s": "_seconds", "USD": "_USD"}
    for name in SHOWN["both"]:
        pushed = describe(
            Resource({}), {name.target: [Sample(("",) * len(name.target.by), 0, (0,))]}, start_ns=0, now_ns=1
        )
        (metric,) = pushed.scope_metrics[0].metrics
        spelled = metric.name.replace(".", "_") + suffixes.get(metric.unit, "")
        assert spelled + ("_total" if name.target.kind == "counter" else "") == name.target.name
