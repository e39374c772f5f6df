"""The audit in its short form: what a real Prometheus stored through three changes of the leader is exactly the truth.

What needs the `ops` extra is imported where it is used: without it this module can still be collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.made_facts import ended, node, tool

pytestmark = pytest.mark.prometheus

# What cannot happen in an audit: nothing is trimmed.
NEVER = {"agx_queue_trimmed_total"}


@pytest.mark.timeout(240)
def test_prometheus_has_the_truth_through_three_changes_of_the_leader(tmp_path: Path) -> None:
    from audit.audit import audit

    report = audit(tmp_path, runs=300, seed=20_261_122, scrape=1.0, pause=0.03)
    assert report.verdict.broken == []
    truth = {row.name: row.truth for row in report.verdict.rows}
    assert {name for name, total in truth.items() if not total} == NEVER
    assert truth["agx_runs_total"] == report.made + report.real == 300
    assert report.repeats > 0


def test_a_fact_too_many_or_too_few_is_a_difference_in_each_of_its_series() -> None:
    from audit.ledger import Ledger
    from audit.verdict import SCALES, differences

    truth, shown = Ledger(), Ledger()
    for fact in (ended(), node(), tool()):
        truth.note(fact)
        shown.note(fact)
    shown.note(ended())  # known: counts once
    assert not [line for name in SCALES for line in differences(name, truth.truth, shown.truth)]
    shown.note(ended("run-2"))
    names = {"agx_runs_total", "agx_run_duration_seconds_sum", "gen_ai_invoke_agent_tool_calls_bucket"}
    for name in names:
        (*_, more) = differences(name, truth.truth, shown.truth)
        (*_, less) = differences(name, shown.truth, truth.truth)
        assert "truth" in more
        assert "truth" in less
    assert not [*differences("agx_tokens_total", truth.truth, shown.truth)]


def test_a_fall_and_a_value_above_the_truth_are_missteps() -> None:
    from audit.verdict import missteps

    series = ("agx_runs_total", frozenset({("scope", "acme")}))
    assert [*missteps({series: [0, 1, 1, 3]}, {series: 3})] == []
    assert [*missteps({series: [0, 2, 1, 3]}, {series: 3})] == ['{scope="acme"} fell from 2 to 1']
    assert [*missteps({series: [0, 4]}, {series: 3})] == ['{scope="acme"} was 4, truth 3']
    assert [*missteps({series: [1]}, {})] == ['{scope="acme"} was 1, truth 0']
