"""Caps, budgets, zero-initialization and retirement of series."""

from __future__ import annotations

import pytest

from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics import table as t
from agx_sidecar.metrics.series import LABEL_LENGTH, Series
from agx_sidecar.metrics.table import SERIES_BUDGET, Instrument, counter

# Rows of these tests, whatever labels the product's have.
RUNS = counter("runs", (t.SCOPE, t.AGENT, t.OUTCOME), "Runs.", source=t.RUN_ENDED)
STARTED = counter("started", (t.SCOPE, t.AGENT), "Runs.", source=t.RUN_STARTED)


def count(series: Series, instrument: Instrument, *labels: str) -> None:
    cell = series.counter(instrument, *labels)
    cell.add()
    cell.touched = series.now


def zero_initialize_agent(series: Series, scope: str, agent: str) -> None:
    """What a run's first fact makes known."""
    known = {"scope": scope, "agent": agent, "gen_ai_agent_name": agent}
    for instrument in (*i.CATALOGUE, RUNS):
        if instrument.source and all(label.values or label.name in known for label in instrument.by):
            series.zero_initialize(instrument, [label.values or (known[label.name],) for label in instrument.by])


def values(series: Series, instrument: Instrument) -> dict[tuple[str, ...], int]:
    return {sample.labels: sample.value for sample in series.sample()[instrument]}


def test_past_its_cap_a_label_counts_under_other_and_what_is_there_stays() -> None:
    series = Series()
    for n in range(150):
        count(series, i.STREAM_EVENTS, f"scope-{n}")
    count(series, i.STREAM_EVENTS, "scope-3")
    seen = values(series, i.STREAM_EVENTS)
    assert len(seen) == 101
    assert seen["scope-3",] == 2
    assert seen[t.OTHER,] == 50
    assert series.take_overflows() == {"scope": 50}


def test_a_cap_holds_over_all_metrics_with_the_label() -> None:
    series = Series()
    for n in range(100):
        count(series, i.STREAM_EVENTS, f"scope-{n}")
    count(series, STARTED, "new", "support")
    count(series, STARTED, "scope-1", "support")
    assert values(series, STARTED) == {(t.OTHER, "support"): 1, ("scope-1", "support"): 1}


@pytest.mark.parametrize(
    ("instrument", "label", "cap"),
    [
        (i.LISTENER_GAPS, "service", 50),
        (i.RUNS, "service", 50),
        (i.UNPRICED, "model", 100),
        (i.TOOL_CALLS, "tool", 100),
        (i.RUN_ERRORS, "error_type", 50),
    ],
)
def test_each_label_has_its_cap(instrument: Instrument, label: str, cap: int) -> None:
    series = Series()
    wide = instrument.labels.index(label)
    for n in range(cap + 20):
        labels = ["ok"] * len(instrument.labels)
        labels[wide] = f"v{n}"
        count(series, instrument, *labels)
    assert len(values(series, instrument)) == cap + 1


@pytest.mark.parametrize("instrument", [i.CANCELLATIONS, i.TOKENS, i.COST])
def test_a_counter_never_has_more_than_2000_series(instrument: Instrument) -> None:
    series = Series()
    total = 0
    for scope in range(90):
        for agent in range(90):
            labels = {"scope": f"s{scope}", "agent": f"a{agent}", "stage": "call_tools", "reason": "task"}
            labels |= {"model": "m", "type": "input"}
            count(series, instrument, *(labels.get(name, "x") for name in instrument.labels))
            total += 1
    seen = values(series, instrument)
    assert len(seen) <= 2_000
    assert sum(seen.values()) == total
    assert any(t.OTHER in labels for labels in seen)
    # The closed labels keep their meaning.
    closed = [n for n, label in enumerate(instrument.by) if label.closed]
    assert all(labels[n] != t.OTHER for labels in seen for n in closed)


def test_a_histogram_never_has_more_than_200_label_sets() -> None:
    series = Series()
    for agent in range(100):
        for kind in t.STAGES:
            for outcome in t.OUTCOMES:
                series.histogram(i.NODE_DURATION, f"a{agent}", kind, outcome).observe(7)
    samples = series.sample()[i.NODE_DURATION]
    assert len(samples) <= 200
    assert sum(sum(sample.counts) for sample in samples) == 100 * 3 * 4


def test_zero_initialization_leaves_room_for_what_happens() -> None:
    series = Series()
    for scope in range(100):
        zero_initialize_agent(series, f"s{scope}", "support")
        zero_initialize_agent(series, f"s{scope}", "writer")
    assert len(series.cells[i.CANCELLATIONS]) <= SERIES_BUDGET // 2
    assert series.take_overflows() == {}
    count(series, i.CANCELLATIONS, "s99", "writer", "call_tools", "task")
    assert values(series, i.CANCELLATIONS)["s99", "writer", "call_tools", "task"] == 1


def test_an_idle_agent_is_retired_and_returns_at_zero() -> None:
    series = Series()
    zero_initialize_agent(series, "acme", "old")
    count(series, RUNS, "acme", "old", "completed")
    count(series, RUNS, "acme", "busy", "completed")
    series.now = 100
    count(series, RUNS, "acme", "busy", "completed")
    assert series.retire(50)
    assert values(series, RUNS) == {("acme", "busy", "completed"): 2}
    assert "old" not in series.values(t.AGENT)
    assert series.counter(RUNS, "acme", "old", "completed").value == 0


def test_the_zeros_of_a_busy_agent_are_not_retired() -> None:
    series = Series()
    zero_initialize_agent(series, "acme", "support")
    series.now = 100
    count(series, RUNS, "acme", "support", "completed")
    series.retire(50)
    assert values(series, RUNS)["acme", "support", "failed"] == 0


def test_a_retired_value_makes_room_under_its_cap() -> None:
    series = Series()
    for n in range(100):
        count(series, i.STREAM_EVENTS, f"scope-{n}")
    series.retire(50)
    count(series, i.STREAM_EVENTS, "new")
    assert values(series, i.STREAM_EVENTS) == {("new",): 1}


def test_a_very_long_value_is_cut() -> None:
    series = Series()
    count(series, i.STREAM_EVENTS, "x" * 5_000)
    count(series, i.STREAM_EVENTS, "x" * 6_000)
    assert values(series, i.STREAM_EVENTS) == {("x" * LABEL_LENGTH,): 2}
    zero_initialize_agent(series, "y" * 5_000, "z" * 300)
    assert {len(label) for sample in series.sample()[RUNS] for label in sample.labels[:2]} == {LABEL_LENGTH}


def test_no_user_session_or_run_is_ever_a_label() -> None:
    labels = {label for instrument in i.CATALOGUE for label in instrument.labels}
    assert not labels & {"user", "user_id", "session", "session_id", "run", "run_id", "instance", "trace_id"}
