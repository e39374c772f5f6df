"""The chart, rendered by Helm's own engine over a matrix of values and held against the schemas of Kubernetes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, HelmError
from ops.chart import (
    CHART,
    CRDS,
    KNOBS,
    ROOT,
    SECRETS,
    SWITCHES,
    environment_of,
    notes,
    one,
    parent_chart,
    render,
    switched,
)

from agx import __version__
from agx_sidecar.settings import read_settings

KUBERNETES = ("1.28", "1.33", "1.37")
MATRIX = {
    "defaults": {},
    "everything on": switched(True, *SWITCHES),
    "everything off": switched(False, *SWITCHES),
    "secrets": SECRETS,
    "knobs": KNOBS,
    "no deployment": switched(False, "deployment.enabled") | switched(True, "podMonitor.enabled"),
} | {f"only {name}": switched(True, name) for name in SWITCHES}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_every_manifest_is_valid_where_it_may_be_installed(values: dict[str, Any]) -> None:
    manifests = render(values)
    for manifest in manifests:
        if manifest["apiVersion"] not in CRDS:
            for version in KUBERNETES:
                kubernetes_validate.validate(manifest, version, strict=True)
    identities = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_lint_finds_nothing_worse_than_a_missing_icon(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert report["errors"] == []


REFUSED = {
    "typo": ({"replica": 3}, "replica"),
    "typo inside": ({"serviceMonitor": {"enable": True}}, "enable"),
    "unknown threshold": ({"prometheusRule": {"thresholds": {"error_ration": 0.1}}}, "error_ration"),
    "wrong type": ({"replicas": "two"}, "replicas"),
    "wrong protocol": ({"otlp": {"protocol": "http"}}, "protocol"),
    "wrong scheme": ({"redis": {"url": "http://redis:6379"}}, "url"),
    "wrong digest": ({"image": {"digest": "sha256:1"}}, "digest"),
    "wrong sink": ({"sinks": ["logs"]}, "sinks"),
    "objective in percent": ({"prometheusRule": {"thresholds": {"slo_run_success": 99}}}, "slo_run_success"),
    "unknown alert": ({"prometheusRule": {"rules": {"AgxRunLost": {}}}}, "AgxRunLost"),
    "unknown key of an alert": ({"prometheusRule": {"rules": {"AgxRunsLost": {"enabled": False}}}}, "enabled"),
    "wrong duration": ({"prometheusRule": {"rules": {"AgxRunsLost": {"for": "5"}}}}, "for"),
    "not a manifest": ({"extraManifests": [{"kind": "ConfigMap"}]}, "extraManifests"),
    "not a container": ({"extraContainers": [{"name": "proxy"}]}, "extraContainers"),
    "wrong strategy": ({"deployment": {"strategy": {"type": "Rolling"}}}, "strategy"),
    "no revisions": ({"revisionHistoryLimit": -1}, "revisionHistoryLimit"),
    "wrong DNS policy": ({"dnsPolicy": "cluster"}, "dnsPolicy"),
    "alias without an address": ({"hostAliases": [{"hostnames": ["redis"]}]}, "hostAliases"),
    "fewest over most": (
        {"autoscaling": {"enabled": True, "minReplicas": 7}},
        "autoscaling.minReplicas (7) must not be more than autoscaling.maxReplicas (6)",
    ),
    "ingress without a host": ({"console": {"enabled": True, "ingress": {"enabled": True}}}, "console.ingress.hosts"),
    "route without a gateway": (
        {"console": {"enabled": True, "httpRoute": {"enabled": True}}},
        "console.httpRoute.parentRefs",
    ),
    "worker without an image": (
        {"worker": {"enabled": True, "target": "shop:worker"}},
        "worker.enabled needs worker.image",
    ),
    "wrong worker": ({"worker": {"target": "shop"}}, "target"),
    "scaling without Prometheus": (
        {"worker": {"enabled": True, "image": "shop", "target": "shop:worker", "scaling": {"enabled": True}}},
        "worker.scaling.serverAddress",
    ),
    "fewest workers over most": (
        {
            "worker": {
                "enabled": True,
                "image": "shop",
                "target": "shop:worker",
                "scaling": {"enabled": True, "serverAddress": "http://prometheus:9090", "minReplicas": 21},
            }
        },
        "worker.scaling.minReplicas (21) must not be more than worker.scaling.maxReplicas (20)",
    ),
    "page of no trace": ({"dashboards": {"tracePage": "http://phoenix:6006/traces/"}}, "tracePage"),
    "no address of a console": ({"dashboards": {"consoleUrl": "console"}}, "consoleUrl"),
    "no time to drain": ({"otlp": {"timeout": 30}}, "terminationGracePeriodSeconds (30) must be longer"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_values_are_refused_with_a_message_that_names_them(values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError) as refusal:
        render(values)
    assert said in str(refusal.value)


def test_the_schema_knows_exactly_the_values_there_are() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rules = yaml.safe_load((ROOT / "dashboards" / "rules" / "agx.rules.yaml").read_text())
    names = {rule["labels"]["name"] for rule in rules["groups"][0]["rules"]}
    thresholds = schema["properties"]["prometheusRule"]["properties"]["thresholds"]["properties"]
    assert set(thresholds) == names
    thresholds.clear()
    assert schema["properties"].pop("enabled")["type"] == "boolean"
    assert _keys(schema) == _keys_of_values(values, schema)


def _keys(schema: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, below in schema["properties"].items():
        found |= {prefix + key} | (_keys(below, f"{prefix}{key}.") if "properties" in below else set())
    return found


def _keys_of_values(values: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        below = schema["properties"].get(key, {})
        found |= {prefix + key}
        if "properties" in below:
            found |= _keys_of_values(value, below, f"{prefix}{key}.")
    return found


def test_the_pods_are_locked_down_and_drain_in_time() -> None:
    manifests = render(SECRETS)
    for name in ("agx-agx-sidecar", "agx-agx-sidecar-console"):
        pod = one(manifests, "Deployment", name)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["terminationGracePeriodSeconds"] > 10
    assert one(manifests, "ServiceAccount")["automountServiceAccountToken"] is False
    assert one(manifests, "Service")["spec"]["publishNotReadyAddresses"] is True
    assert one(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_each_probe_uses_its_own_values() -> None:
    values = {
        f"{probe}Probe": {"periodSeconds": 11 + n} for n, probe in enumerate(("startup", "liveness", "readiness"))
    }
    (container,) = one(render(values), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert [container[f"{probe}Probe"]["periodSeconds"] for probe in ("startup", "liveness", "readiness")] == [
        11,
        12,
        13,
    ]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/healthz"


def test_secrets_come_by_reference_and_certificates_as_files() -> None:
    environment, pod = environment_of(SECRETS)
    assert environment["AGX_REDIS_URL"] == "redis/url"
    assert environment["AGX_REDIS_PASSWORD"] == "redis/pw"
    assert environment["OTEL_EXPORTER_OTLP_HEADERS"] == "otlp/headers"
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    files = {
        f"{mounted[volume['name']]}/{item['path']}" for volume in pod["volumes"] for item in volume["secret"]["items"]
    }
    pointed_at = {value for value in environment.values() if value.startswith("/etc/agx")}
    assert len(files) == 6
    # The URL is the secret's own, so it names Redis' client certificate itself.
    assert files - pointed_at == {"/etc/agx/redis/cert.pem", "/etc/agx/redis/key.pem"}


def test_the_sidecar_understands_what_the_chart_tells_it() -> None:
    redis = {"url": "rediss://redis:6380/2", "existingSecret": "r", "secretKeys": {"ca": "ca", "cert": "c", "key": "k"}}
    environment, _ = environment_of(
        {"redis": redis | {"keyPrefix": "mine"}, "otlp": SECRETS["otlp"], "sinks": ["traces"]}
    )
    settings = read_settings(environment)
    assert (settings.redis.nodes, settings.redis.database, settings.redis.tls) == ((("redis", 6380),), 2, True)
    assert settings.redis.password == "r/password"
    assert settings.redis.options == {
        "ssl_ca_certs": "/etc/agx/redis/ca.pem",
        "ssl_certfile": "/etc/agx/redis/cert.pem",
        "ssl_keyfile": "/etc/agx/redis/key.pem",
    }
    assert (settings.prefix, settings.sinks, settings.otlp_protocol) == ("mine", {"traces"}, "grpc")
    assert (settings.http_host, settings.http_port) == ("0.0.0.0", 9464)
    assert (settings.log_format, settings.log_level) == ("json", "INFO")
    defaults = read_settings(environment_of({})[0])
    assert defaults.sinks == {"metrics"}
    assert read_settings(environment_of({"otlp": {"endpoint": "http://c:4318"}})[0]).sinks == {"metrics", "traces"}


def test_replicas_are_left_to_the_autoscaler() -> None:
    assert one(render({}), "Deployment")["spec"]["replicas"] == 2
    manifests = render(switched(True, "autoscaling.enabled"))
    assert "replicas" not in one(manifests, "Deployment")["spec"]
    assert one(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == "agx-agx-sidecar"


def test_a_service_has_the_sidecar_in_its_own_pod_as_the_readme_says(tmp_path: Path) -> None:
    readme = (CHART / "README.md").read_text()
    chart, values, template = re.search(
        r"# Chart.yaml\n(.*?)# values.yaml\n(.*?)```.*?# templates/deployment.yaml\n(.*?)```", readme, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    secrets = yaml.safe_load(values)
    secrets["agx-sidecar"] |= {"redis": SECRETS["redis"], "enabled": True}
    parent = parent_chart(
        tmp_path,
        {
            "Chart.yaml": "apiVersion: v2\nname: service\nversion: 1.0.0\n" + chart,
            "values.yaml": yaml.safe_dump(secrets),
            "templates/deployment.yaml": "apiVersion: apps/v1\nkind: Deployment\nmetadata: { name: service }\n"
            "spec:\n  selector: { matchLabels: { app: service } }\n"
            + template.replace("      labels:\n", "      labels:\n        app: service\n"),
        },
    )
    manifests = render({}, parent, "mine")
    deployment = one(manifests, "Deployment", "service")
    kubernetes_validate.validate(deployment, "1.37", strict=True)
    names = [container["name"] for container in deployment["spec"]["template"]["spec"]["containers"]]
    assert names == ["service", "agx-sidecar"]
    monitor = one(manifests, "PodMonitor", "mine-agx-sidecar")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert {manifest["kind"] for manifest in manifests} == {"Deployment", "PodMonitor"}


def test_objects_find_each_other_by_labels() -> None:
    manifests = render(switched(True, *SWITCHES))
    for name in ("agx-agx-sidecar", "agx-agx-sidecar-console"):
        labels = one(manifests, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert one(manifests, "Service", name)["spec"]["selector"].items() <= labels.items()
        assert one(manifests, "Deployment", name)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    service = one(manifests, "Service")["metadata"]["labels"]
    monitor = one(manifests, "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service.items()
    assert monitor["spec"]["endpoints"][0]["port"] == one(manifests, "Service")["spec"]["ports"][0]["name"]
    console = one(manifests, "Service", "agx-agx-sidecar-console")["metadata"]["labels"]
    assert not monitor["spec"]["selector"]["matchLabels"].items() <= console.items()


def test_the_chart_is_of_the_packages_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_nothing_depends_on_what_a_cluster_offers() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    assert ".Capabilities" not in templates
    assert "tpl " not in templates


def test_the_notes_say_what_is_missing_and_no_password() -> None:
    text = notes({"redis": {"url": "redis://user:hunter2@redis:6379/0"}})
    assert "hunter2" not in text
    assert "otlp.endpoint" in text
    assert "serviceMonitor.enabled=true" in text
    assert "{{" not in notes(SECRETS)


def test_the_committed_chart_is_what_its_sources_make() -> None:
    subprocess.run([sys.executable, "helm/sync.py", "--check"], cwd=ROOT, check=True, timeout=60)


def test_the_chart_packs_with_everything_it_reads(tmp_path: Path) -> None:
    archive = helm_python.package(CHART, destination=tmp_path)
    with Chart.load(archive) as packed:
        packed.render(switched(True, *SWITCHES), name="agx", namespace="monitoring")
        assert {"README.md", "files/agx.rules.yaml"} <= {file["name"] for file in packed.files}
