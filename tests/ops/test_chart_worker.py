"""Workers in the chart: their command, probes, Redis user, hand-over time and scaling."""

from __future__ import annotations

from typing import Any

from ops.chart import KNOBS, environment_of, one, render

from agx.cli import build_parser
from agx.jobs.worker import Worker
from agx_sidecar.metrics import instruments

WORKER = "agx-agx-sidecar-worker"
SHOP: dict[str, Any] = {"enabled": True, "image": "r.example.org/shop:1", "target": "shop.agents:worker"}


def test_workers_are_off_by_default() -> None:
    assert WORKER not in {manifest["metadata"]["name"] for manifest in render({})}


def test_agx_worker_understands_the_pod_s_command() -> None:
    spec = one(render({"worker": SHOP | {"atOnce": 50}}), "Deployment", WORKER)["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    program, *arguments = container["command"]
    args = build_parser().parse_args(arguments)
    assert (program, args.worker, args.at_once, args.health) == ("agx", "shop.agents:worker", 50, "0.0.0.0:8081")
    (port,) = container["ports"]
    assert port["containerPort"] == 8081
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert [probe["path"] for probe in probes.values()] == ["/healthz", "/healthz", "/readyz"]
    assert spec["replicas"] == 2
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_a_pod_has_time_to_hand_its_runs_over() -> None:
    pod = environment_of({"worker": SHOP}, WORKER)[1]
    assert pod["terminationGracePeriodSeconds"] >= Worker({"a": _no_recipe})._grace + 15
    given = environment_of({"worker": SHOP | {"terminationGracePeriodSeconds": 300}}, WORKER)[1]
    assert given["terminationGracePeriodSeconds"] == 300


async def _no_recipe(job: object) -> Any:
    raise NotImplementedError


def test_a_worker_has_its_own_redis_user() -> None:
    redis = {"url": "redis://agx-sidecar@redis:6379", "existingSecret": "sidecar"}
    own = {"url": "redis://agx-worker@redis:6379", "existingSecret": "worker"}
    shared, _ = environment_of({"redis": redis, "worker": SHOP}, WORKER)
    assert (shared["AGX_REDIS_URL"], shared["AGX_REDIS_PASSWORD"]) == (redis["url"], "sidecar/password")
    separate, _ = environment_of({"redis": redis, "worker": SHOP | {"redis": own}}, WORKER)
    assert (separate["AGX_REDIS_URL"], separate["AGX_REDIS_PASSWORD"]) == (own["url"], "worker/password")
    sidecar, _ = environment_of({"redis": redis, "worker": SHOP | {"redis": own}})
    assert sidecar["AGX_REDIS_URL"] == redis["url"]


def test_keda_scales_workers_by_waiting_jobs() -> None:
    values = {"worker": KNOBS["worker"]}
    manifests = render(values)
    assert "replicas" not in one(manifests, "Deployment", WORKER)["spec"]
    spec = one(manifests, "ScaledObject", WORKER)["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": WORKER}
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "prometheus"
    assert instruments.JOBS_WAITING.name in trigger["metadata"]["query"]
    assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA accepts nothing else
