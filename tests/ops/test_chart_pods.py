"""What users can change in the chart's pods and objects: namespace, containers, DNS, security contexts, manifests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ops.chart import CHART, KNOBS, one, parent_chart, render

NAMES = ("agx-agx-sidecar", "agx-agx-sidecar-console")


def _deployments(values: dict[str, Any]) -> list[dict[str, Any]]:
    manifests = render({"console": {"enabled": True}} | values)
    return [one(manifests, "Deployment", name) for name in NAMES]


def test_every_object_is_in_the_namespace_given() -> None:
    for manifest in render({"namespaceOverride": "agents", "console": {"enabled": True}}):
        assert manifest["metadata"]["namespace"] == "agents"
    for manifest in render({"console": {"enabled": True}}):
        assert manifest["metadata"]["namespace"] == "monitoring"


def test_more_manifests_arrive_as_they_are() -> None:
    (given,) = KNOBS["extraManifests"]
    assert given in render({"extraManifests": [given]})


@pytest.mark.parametrize("key", ["dnsPolicy", "dnsConfig", "hostAliases", "initContainers"])
def test_both_kinds_of_pod_get_what_is_given(key: str) -> None:
    for deployment in _deployments({}):
        assert key not in deployment["spec"]["template"]["spec"]
    for deployment in _deployments({key: KNOBS[key]}):
        assert deployment["spec"]["template"]["spec"][key] == KNOBS[key]


def test_more_containers_stand_beside_ours() -> None:
    for deployment in _deployments({"extraContainers": KNOBS["extraContainers"]}):
        ours, theirs = deployment["spec"]["template"]["spec"]["containers"]
        assert ours["name"] in ("agx-sidecar", "console")
        assert theirs == KNOBS["extraContainers"][0]


def test_a_deployment_has_the_strategy_and_the_history_given() -> None:
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}}
    sidecar, console = _deployments({"deployment": {"strategy": strategy}, "revisionHistoryLimit": 0})
    assert sidecar["spec"]["strategy"] == strategy
    assert sidecar["spec"]["revisionHistoryLimit"] == console["spec"]["revisionHistoryLimit"] == 0
    assert "strategy" not in _deployments({})[0]["spec"]


NO_IDS = {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}


def test_user_ids_that_are_null_are_left_to_openshift(tmp_path: Path) -> None:
    wanted = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for deployment in _deployments(NO_IDS):
        assert deployment["spec"]["template"]["spec"]["securityContext"] == wanted
    # Where this chart is a dependency, Helm ignores a null in the parent's values.yaml.
    empty = {"podSecurityContext": dict.fromkeys(NO_IDS["podSecurityContext"], "")}
    parent = parent_chart(
        tmp_path,
        {
            "Chart.yaml": "apiVersion: v2\nname: service\nversion: 1.0.0\n"
            "dependencies:\n  - { name: agx-sidecar, version: 0.2.0, repository: 'file://../agx-sidecar' }\n",
            "values.yaml": yaml.safe_dump({"agx-sidecar": empty}),
        },
    )
    for values in ({}, {"agx-sidecar": NO_IDS}):
        deployment = one(render(values, parent, "mine"), "Deployment", "mine-agx-sidecar")
        kubernetes_validate.validate(deployment, "1.37", strict=True)
        assert deployment["spec"]["template"]["spec"]["securityContext"] == wanted


def test_pods_restart_when_a_secret_that_they_read_has_changed(tmp_path: Path) -> None:
    """Helm's `lookup` finds nothing without a cluster, so a function of the same result stands in for it."""
    chart = parent_chart(tmp_path, {"Chart.yaml": "apiVersion: v2\nname: service\nversion: 1.0.0\n"})
    pod = chart / "charts" / "agx-sidecar" / "templates" / "_pod.tpl"
    lookup = re.compile(r'\(lookup "v1" "Secret" \(include "agx-sidecar.namespace" \$.root\) \$name\)')
    assert len(lookup.findall(pod.read_text())) == 1
    template = pod.read_text()
    values = {"redis": {"existingSecret": "r"}, "otlp": {"existingSecret": "o"}, "console": {"enabled": True}}

    def annotations(content: str, name: str) -> dict[str, str]:
        pod.write_text(lookup.sub(f'(dict "data" (dict "password" (printf "%s-{content}" $name)))', template))
        found = one(render({"agx-sidecar": values}, chart, "mine"), "Deployment", name)["spec"]["template"]["metadata"]
        annotations: dict[str, str] = found["annotations"]
        return annotations

    first, same, second = (annotations(content, "mine-agx-sidecar") for content in ("1", "1", "2"))
    assert set(first) == {"checksum/r", "checksum/o"}
    assert len({*first.values(), *second.values()}) == 4
    assert first == same
    assert set(annotations("1", "mine-agx-sidecar-console")) == {"checksum/r", "checksum/mine-agx-sidecar-console"}
    assert "annotations" not in one(render(values), "Deployment")["spec"]["template"]["metadata"]


def test_every_template_is_in_the_chart_once() -> None:
    defined = [
        name
        for path in (CHART / "templates").rglob("*.*")
        for name in re.findall(r'define "([^"]+)"', path.read_text())
    ]
    assert len(defined) == len(set(defined))
