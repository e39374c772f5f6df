"""Renders the chart with Helm's own engine and reads the result, for the chart's tests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "agx-sidecar"
# Of objects whose schema Kubernetes does not have.
CRDS = {
    "monitoring.coreos.com/v1",
    "grafana.integreatly.org/v1beta1",
    "gateway.networking.k8s.io/v1",
    "keda.sh/v1alpha1",
}

# Every switch of the chart, with nothing else set.
SWITCHES = (
    "autoscaling.enabled",
    "podDisruptionBudget.enabled",
    "serviceAccount.create",
    "networkPolicy.enabled",
    "serviceMonitor.enabled",
    "podMonitor.enabled",
    "prometheusRule.enabled",
    "dashboards.enabled",
    "console.enabled",
    "deployment.enabled",
)

# Values with every secret, and values with everything else set.
SECRETS = {
    "redis": {
        "existingSecret": "redis",
        "secretKeys": {"url": "url", "password": "pw", "ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"},
    },
    "otlp": {
        "endpoint": "https://collector:4317",
        "protocol": "grpc",
        "existingSecret": "otlp",
        "secretKeys": {"headers": "headers", "ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"},
    },
    "console": {"enabled": True, "mode": "full", "content": True, "existingSecret": "console"},
}
KNOBS = {
    "nameOverride": "watcher",
    "commonLabels": {"team": "agents"},
    "commonAnnotations": {"owner": "us"},
    "global": {"anything": 1},
    "image": {"repository": "r.example.org/agx", "digest": "sha256:" + "a" * 64, "pullPolicy": "Always"},
    "namespaceOverride": "agents",
    "extraManifests": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "env"}, "data": {"A": "{{ not templated }}"}}
    ],
    "imagePullSecrets": [{"name": "pull"}],
    "sinks": ["metrics", "traces"],
    "deployment": {
        "annotations": {"a": "b"},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}},
    },
    "revisionHistoryLimit": 3,
    "initContainers": [{"name": "wait", "image": "busybox", "command": ["true"]}],
    "extraContainers": [{"name": "proxy", "image": "proxy"}],
    "dnsPolicy": "None",
    "dnsConfig": {"nameservers": ["10.0.0.10"]},
    "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["redis"]}],
    "podLabels": {"x": "y"},
    "podAnnotations": {"p": "q"},
    "extraEnv": [{"name": "A", "value": "1"}],
    "extraEnvFrom": [{"configMapRef": {"name": "env"}}],
    "extraVolumes": [{"name": "tmp", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "k", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
    ],
    "priorityClassName": "high",
    "service": {"type": "NodePort", "port": 80, "annotations": {"s": "t"}},
    "serviceAccount": {"name": "mine", "annotations": {"iam": "role"}},
    "networkPolicy": {
        "enabled": True,
        "ingressFrom": [{"podSelector": {}}],
        "consoleIngressFrom": [{"namespaceSelector": {}}],
        "egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 6379}]}],
    },
    "serviceMonitor": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "interval": "30s",
        "scrapeTimeout": "10s",
        "relabelings": [{"action": "labeldrop", "regex": "endpoint"}],
        "metricRelabelings": [{"action": "drop", "sourceLabels": ["__name__"], "regex": "agx_node_.+"}],
    },
    "prometheusRule": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "thresholds": {"error_ratio": 0.25, "lost_runs": 0, "token_burn_min_tokens": 5_000_000},
        "rules": {
            "AgxRunsLost": {"severity": "warning", "for": "5m", "labels": {"team": "agents"}},
            "AgxUnpricedCost": {"disabled": True},
        },
        "grafanaUrl": "https://grafana.example.org/",
    },
    "dashboards": {
        "enabled": True,
        "namespace": "grafana",
        "folder": "Agents",
        "label": "my_label",
        "labelValue": "yes",
        "grafanaOperator": {"enabled": True, "instanceSelector": {"matchLabels": {"g": "h"}}},
    },
    "worker": {
        "enabled": True,
        "image": "r.example.org/shop:1",
        "target": "shop.agents:worker",
        "terminationGracePeriodSeconds": 90,
        "env": [{"name": "OPENAI_API_KEY", "value": "k"}],
        "envFrom": [{"secretRef": {"name": "models"}}],
        "scaling": {"enabled": True, "serverAddress": "http://prometheus:9090"},
    },
    "autoscaling": {
        "enabled": True,
        "metrics": [
            {
                "type": "External",
                "external": {"metric": {"name": "agx_queue_lag_seconds"}, "target": {"type": "Value", "value": "30"}},
            }
        ],
    },
}


def switched(value: bool, *names: str) -> dict[str, Any]:
    """Return values with switches set."""
    values: dict[str, Any] = {}
    for name in names:
        section, key = name.split(".")
        values.setdefault(section, {})[key] = value
    return values


def render(values: Mapping[str, Any], chart: Path = CHART, name: str = "agx") -> list[dict[str, Any]]:
    """Return the manifests, the notes left out."""
    with Chart.load(chart) as loaded:
        files = loaded.render(dict(values), name=name, namespace="monitoring")
    documents = (part for path, text in files.items() if not path.endswith(".txt") for part in yaml.safe_load_all(text))
    return [document for document in documents if document]


def notes(values: Mapping[str, Any]) -> str:
    """Return NOTES.txt."""
    with Chart.load(CHART) as loaded:
        return loaded.render(dict(values), name="agx", namespace="monitoring")["agx-sidecar/templates/NOTES.txt"]


def one(manifests: list[dict[str, Any]], kind: str, name: str = "agx-agx-sidecar") -> dict[str, Any]:
    """Return the manifest of this kind and name."""
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def parent_chart(directory: Path, files: Mapping[str, str]) -> Path:
    """Make a chart that has ours as its dependency."""
    parent = directory / "service"
    shutil.copytree(CHART, parent / "charts" / "agx-sidecar")
    for name, text in files.items():
        path = parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return parent


def environment_of(values: dict[str, Any], name: str = "agx-agx-sidecar") -> tuple[dict[str, str], dict[str, Any]]:
    """Return the environment of a Deployment's process, with references to secrets as `secret/key`, and its pod."""
    pod = one(render(values), "Deployment", name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {}
    for entry in container["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        environment[entry["name"]] = f"{reference['name']}/{reference['key']}" if reference else entry["value"]
    return environment, pod
