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
CRDS = "monitoring.coreos.com/v1"

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
