"""Boards, rules and monitors in the chart: equal to their sources but for what the values change."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ops.chart import CHART, KNOBS, ROOT, one, render, switched


def test_boards_arrive_unchanged_where_grafanas_sidecar_looks() -> None:
    manifests = [m for m in render(KNOBS | {"extraManifests": []}) if m["kind"] == "ConfigMap"]
    boards = {path.name: json.loads(path.read_text()) for path in (ROOT / "dashboards" / "json").glob("*.json")}
    assert {name: json.loads(text) for m in manifests for name, text in m["data"].items()} == boards
    for manifest in manifests:
        assert manifest["metadata"]["labels"]["my_label"] == "yes"
        assert manifest["metadata"]["annotations"]["grafana_folder"] == "Agents"


def test_links_on_the_boards_follow_the_values() -> None:
    page = "https://logfire.example/org/project?q=trace_id='{trace_id}'"
    links = {"enabled": True, "consoleUrl": "https://agx.example/", "tracePage": page}
    boards = [m for m in render({"dashboards": links}) if m["kind"] == "ConfigMap"]
    texts = [text for board in boards for text in board["data"].values()]
    for text in texts:
        json.loads(text)
        assert "127.0.0.1" not in text
        assert '"url": "https://agx.example"' in text
    (runs,) = (text for text in texts if "Last failed and lost runs" in text)
    assert '"https://agx.example/run?scope=${__data.fields[\\"agx.scope.id' in runs
    assert "\"https://logfire.example/org/project?q=trace_id='${__data.fields.traceIdHidden}'\"" in runs
    assert runs.count("traceIdHidden") == 1


def test_grafanas_operator_finds_each_board_in_its_config_map() -> None:
    manifests = render(KNOBS | {"extraManifests": []})
    boards = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "ConfigMap"}
    found = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "GrafanaDashboard"}
    assert set(found) == set(boards)
    assert len(found) == 3
    for name, manifest in found.items():
        assert manifest["metadata"]["namespace"] == boards[name]["metadata"]["namespace"] == "grafana"
        assert manifest["spec"]["configMapRef"] == {"name": name, "key": next(iter(boards[name]["data"]))}
        assert manifest["spec"]["instanceSelector"]["matchLabels"]["g"] == "h"
        assert manifest["spec"]["folder"] == "Agents"
    assert not [m for m in render(switched(True, "dashboards.enabled")) if m["kind"] == "GrafanaDashboard"]


def test_rules_arrive_unchanged_but_for_the_thresholds_that_were_given() -> None:
    source = yaml.safe_load((ROOT / "dashboards" / "rules" / "agx.rules.yaml").read_text())
    assert one(render(switched(True, "prometheusRule.enabled")), "PrometheusRule")["spec"] == source
    changed = one(render(KNOBS | {"nameOverride": ""}), "PrometheusRule")["spec"]
    thresholds = {rule["labels"]["name"]: rule["expr"] for rule in changed["groups"][0]["rules"]}
    assert thresholds["error_ratio"] == "vector(0.25)"
    assert thresholds["lost_runs"] == "vector(0)"
    assert float(thresholds["token_burn_min_tokens"].removeprefix("vector(").removesuffix(")")) == 5_000_000
    assert thresholds["lag_seconds"] == "vector(60)"
    for rule in changed["groups"][-1]["rules"]:
        assert rule["annotations"]["dashboard_url"].startswith("https://grafana.example.org/d/agx-")


def _alerts(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = one(render({"prometheusRule": {"enabled": True} | values}), "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def test_a_single_alert_gets_another_severity_a_wait_and_labels_or_is_left_out() -> None:
    given = {
        "AgxRunsLost": {"severity": "warning", "for": "5m", "labels": {"team": "agents"}},
        "AgxSidecarLag": {"labels": {"severity": "page", "team": "sre"}},
        "AgxUnpricedCost": {"disabled": True},
    }
    before, after = _alerts({}), _alerts({"rules": given})
    assert set(before) - set(after) == {"AgxUnpricedCost"}
    assert after["AgxRunsLost"]["labels"] == {"severity": "warning", "team": "agents"}
    assert after["AgxRunsLost"]["for"] == "5m"
    # `severity` has a key of its own, which wins.
    assert after["AgxSidecarLag"]["labels"] == {"severity": "warning", "team": "sre"}
    for name in set(after) - set(given):
        assert after[name] == before[name]


def test_an_alerts_link_is_complete_only_with_the_address_of_grafana() -> None:
    for rule in _alerts({}).values():
        assert rule["annotations"]["dashboard_url"].startswith("/d/agx-")
    for rule in _alerts({"grafanaUrl": "https://g.example.org/grafana/"}).values():
        assert rule["annotations"]["dashboard_url"].startswith("https://g.example.org/grafana/d/agx-")


def test_the_schema_knows_exactly_the_alerts_there_are() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    rules = schema["properties"]["prometheusRule"]["properties"]["rules"]
    assert rules["propertyNames"]["enum"] == list(_alerts({}))


@pytest.mark.prometheus
@pytest.mark.parametrize("values", [switched(True, "prometheusRule.enabled"), KNOBS], ids=["defaults", "knobs"])
def test_promtool_finds_the_rendered_rules_valid(values: dict[str, Any], tmp_path: Path) -> None:
    (rule,) = [manifest for manifest in render(values) if manifest["kind"] == "PrometheusRule"]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    subprocess.run(["promtool", "check", "rules", path], check=True, timeout=30)


def _scrape_configs() -> dict[str, dict[str, Any]]:
    """Both monitors as a plain scrape configuration would say it."""
    manifests = render(KNOBS | {"nameOverride": "", "podMonitor": KNOBS["serviceMonitor"]})
    endpoints = {
        "service": one(manifests, "ServiceMonitor")["spec"]["endpoints"],
        "pod": one(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"],
    }
    return {
        name: {
            "job_name": name,
            "honor_labels": endpoint["honorLabels"],
            "metrics_path": endpoint["path"],
            "scrape_interval": endpoint["interval"],
            "scrape_timeout": endpoint["scrapeTimeout"],
            "relabel_configs": [_plain(rule) for rule in endpoint["relabelings"]],
            "metric_relabel_configs": [_plain(rule) for rule in endpoint["metricRelabelings"]],
        }
        for name, (endpoint,) in endpoints.items()
    }


def _plain(relabeling: dict[str, Any]) -> dict[str, Any]:
    return {re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), key): value for key, value in relabeling.items()}


def test_monitors_relabel_as_the_plain_scrape_file_does_and_then_as_the_user_wants() -> None:
    (plain,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    for config in _scrape_configs().values():
        *ours, theirs = config["metric_relabel_configs"]
        assert ours == plain["metric_relabel_configs"]
        assert theirs["action"] == "drop"
        assert config["honor_labels"] == plain["honor_labels"] is True


@pytest.mark.prometheus
def test_prometheus_would_take_what_the_monitors_say(tmp_path: Path) -> None:
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump({"scrape_configs": list(_scrape_configs().values())}))
    subprocess.run(["promtool", "check", "config", path], check=True, timeout=30)
