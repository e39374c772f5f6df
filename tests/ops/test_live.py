"""Boards and rules on a real Prometheus that scrapes two real sidecars under traffic of every outcome."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import httpx
import pytest
from ops.boards import MARKS, Target, filled, metrics_in, rules, targets
from prometheus_client.parser import text_string_to_metric_families
from support.waiting import wait_until_sync

from agx_sidecar.metrics.instruments import CATALOGUE
from agx_sidecar.metrics.table import Instrument
from agx_sidecar.semconv import HIDDEN, RELEASED
from dashboards.preview.stack import Stack

pytestmark = pytest.mark.prometheus

TARGETS = list(targets())


def _numbers(stack: Stack, target: Target) -> list[float]:
    now = time.time()
    found: list[dict[str, Any]] = stack.query_range(target.expr, now - 10, now, 1)
    values = (float(value) for series in found for _, value in series["values"])
    return [value for value in values if math.isfinite(value)]


@pytest.mark.parametrize("target", TARGETS, ids=[f"{n}-{target.name}" for n, target in enumerate(TARGETS)])
def test_every_query_of_every_panel_returns_a_number(stack: Stack, target: Target) -> None:
    wait_until_sync(lambda: _numbers(stack, target), what=f"a number from {target.expr}")


@pytest.mark.parametrize("mark", [mark for mark in MARKS if mark["name"] != "Alerts"], ids=lambda mark: mark["name"])
def test_what_began_is_marked(stack: Stack, mark: dict[str, Any]) -> None:
    found = wait_until_sync(lambda: stack.query(filled(mark["target"]["expr"])), what=mark["name"])
    labels = set(re.findall(r"\{\{(\w+)\}\}", mark["titleFormat"])) - {"pod"}
    assert all(labels <= series["metric"].keys() for series in found)


@pytest.mark.parametrize("rule", [rule for rule in rules() if "record" in rule], ids=lambda rule: rule["record"])
def test_every_recording_records(stack: Stack, rule: dict[str, Any]) -> None:
    wait_until_sync(lambda: stack.query(filled(rule["record"])), what=rule["record"])


def test_every_metric_that_is_named_is_really_exported(stack: Stack) -> None:
    named = {metric for target in TARGETS for metric in metrics_in(target.expr)}
    named |= {metric for rule in rules() for metric in metrics_in(rule["expr"])}
    named -= {name.target.name for name in RELEASED}  # AGX_SEMCONV=next

    def exported() -> bool:
        found = set()
        for address in stack.sidecars:
            for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text):
                found |= {sample.name for sample in family.samples} | {family.name}
        missing = named - found
        assert not missing, missing
        return True

    wait_until_sync(exported)


def test_fleet_series_have_no_replica_and_the_sidecars_own_have(stack: Stack) -> None:
    """The relabelling of deploy/prometheus.yml takes every fleet series and no other."""

    def stored(instrument: Instrument) -> list[dict[str, Any]]:
        suffix = "_count" if instrument.kind == "histogram" else ""
        return stack.query(instrument.name + suffix)

    for instrument in set(CATALOGUE) - HIDDEN["current"]:
        found = wait_until_sync(lambda instrument=instrument: stored(instrument), what=instrument.name)
        assert all(("instance" in series["metric"]) != instrument.fleet for series in found), instrument.name


def test_the_services_name_is_not_pushed_aside_by_the_scrape(stack: Stack) -> None:
    found = wait_until_sync(lambda: stack.query("agx_listeners"))
    # The demo service of another test may be there too.
    assert {"web", "jobs"} <= {series["metric"]["service"] for series in found} <= {"web", "jobs", "demo"}


def test_no_alert_rule_fails_to_evaluate(stack: Stack) -> None:
    def evaluated() -> bool:
        groups = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"]
        health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        assert "unknown" not in health.values()
        return bool(health) and set(health.values()) == {"ok"}

    wait_until_sync(evaluated)
