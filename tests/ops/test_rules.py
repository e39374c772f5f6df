"""The rules: valid, each alert with a runbook, a board, a threshold and tests that make it fire and stay silent."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ops.boards import BOARDS, BY_NAME, ROOT, RULES, rules

ALERTS = [rule for rule in rules() if "alert" in rule]
TESTS = sorted((RULES.parent / "tests").glob("*.yaml"))
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text()
PAGE = "https://github.com/opale/pydantic-ai-stream/blob/main/docs/runbooks.md"


@pytest.mark.prometheus
def test_promtool_finds_the_rules_valid() -> None:
    subprocess.run(["promtool", "check", "rules", "--lint=all", "--lint-fatal", RULES], check=True, timeout=30)


@pytest.mark.prometheus
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_promtools_unit_tests_pass(path: Path) -> None:
    command = ["promtool", "test", "rules", path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_made_to_fire_and_to_stay_silent() -> None:
    cases = [case for path in TESTS for case in yaml.safe_load(path.read_text())["tests"]]
    checks = [check for case in cases for check in case.get("alert_rule_test", ())]
    names = {alert["alert"] for alert in ALERTS}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == names
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == names


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_every_alert_says_what_to_read_and_where_to_look(alert: dict) -> None:  # type: ignore[type-arg]
    annotations = alert["annotations"]
    assert annotations["summary"]
    assert annotations["description"]
    assert annotations["runbook_url"] == f"{PAGE}#{alert['alert'].lower()}"
    assert f"\n## {alert['alert']}\n" in RUNBOOKS
    board, parameters = re.match(r"/d/(agx-\w+)\?from=now-3h&to=now(.*)", annotations["dashboard_url"]).groups()  # type: ignore[union-attr]
    assert board in BOARDS
    assert "&var-namespace={{ $labels.namespace }}&var-job={{ " in parameters
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}


def test_no_runbook_is_about_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## (Agx\w+)$", RUNBOOKS, re.MULTILINE)) == {alert["alert"] for alert in ALERTS}


def test_every_threshold_is_used_and_documented_with_its_value() -> None:
    thresholds = {rule["labels"]["name"]: rule["expr"] for rule in rules() if rule.get("record") == "agx:threshold"}
    compared = [name for rule in rules() for name in re.findall(r'agx:threshold\{name="(\w+)"\}', rule["expr"])]
    assert set(compared) == set(thresholds)
    table = dict(re.findall(r"^\| `(\w+)` \| ([0-9.]+) \|", RUNBOOKS, re.MULTILINE))
    assert {name: f"vector({value})" for name, value in table.items()} == thresholds


def test_a_bucket_that_a_rule_names_is_one_of_its_histogram() -> None:
    named = [
        (metric, limit)
        for rule in rules()
        for metric, limit in re.findall(r'(\w+)_bucket\{[^}]*le="([0-9.]+)"', rule["expr"])
    ]
    assert named
    for metric, limit in named:
        instrument = BY_NAME[metric]
        assert float(limit) in [bucket / instrument.scale for bucket in instrument.buckets]


def test_a_count_in_an_annotation_is_rounded() -> None:
    counted = [alert for alert in ALERTS if re.search(r"increase(\d+m|\()", alert["expr"])]
    assert len(counted) == 6
    for alert in counted:
        assert '{{ printf "%.0f" $value }}' in str(alert["annotations"]), alert["alert"]
        assert "About" not in str(alert["annotations"])


def test_no_alert_compares_with_a_number_of_its_own() -> None:
    for alert in ALERTS:
        for number in re.findall(r"[<>]=?\s*([0-9.]+)\b", alert["expr"]):
            raise AssertionError(f"{alert['alert']} compares with {number}: make it a threshold")
