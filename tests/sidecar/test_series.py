"""Caps, budgets, births and burials of series."""

from __future__ import annotations

import pytest

from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.births import bear_agent
from agx_sidecar.metrics.series import LABEL_LENGTH, Series


def count(series: Series, instrument: i.Instrument, *labels: str) -> None:
    series.counter(instrument, labels, 0).add(1, 0)


def values(series: Series, instrument: i.Instrument) -> dict[tuple[str, ...], int]:
    return {shown.labels: shown.value for shown in series.show()[instrument]}


def test_past_its_cap_a_label_counts_under_other_and_what_is_there_stays() -> None:
    series = Series()
    for n in range(150):
        count(series, i.STREAM_EVENTS, f"scope-{n}")
    count(series, i.STREAM_EVENTS, "scope-3")
    seen = values(series, i.STREAM_EVENTS)
    assert len(seen) == 101
    assert seen["scope-3",] == 2
    assert seen[i.OTHER,] == 50
    assert series.take_overflows() == {"scope": 50}


def test_a_cap_holds_over_all_metrics_with_the_label() -> None:
    series = Series()
    for n in range(100):
        count(series, i.STREAM_EVENTS, f"scope-{n}")
    count(series, i.RUNS_STARTED, "new", "support")
    count(series, i.RUNS_STARTED, "scope-1", "support")
    assert values(series, i.RUNS_STARTED) == {(i.OTHER, "support"): 1, ("scope-1", "support"): 1}


@pytest.mark.parametrize(
    ("instrument", "cap"), [(i.LISTENER_GAPS, 50), (i.UNPRICED, 100), (i.TOOL_CALLS, 100), (i.RUN_ERRORS, 50)]
)
def test_each_label_has_its_cap(instrument: i.Instrument, cap: int) -> None:
    series = Series()
    wide = instrument.labels.index("error_type") if "error_type" in instrument.labels else -1
    if "tool" in instrument.labels:
        wide = instrument.labels.index("tool")
    for n in range(cap + 20):
        labels = ["ok"] * len(instrument.labels)
        labels[wide] = f"v{n}"
        count(series, instrument, *labels)
    assert len(values(series, instrument)) == cap + 1


@pytest.mark.parametrize("instrument", [i.CANCELLATIONS, i.TOKENS, i.COST])
def test_a_counter_never_has_more_than_2000_series(instrument: i.Instrument) -> None:
    series = Series()
    total = 0
    for scope in range(90):
        for agent in range(90):
            labels = {"scope": f"s{scope}", "agent": f"a{agent}", "stage": "call_tools", "reason": "task"}
            labels |= {"model": "m", "type": "input"}
            count(series, instrument, *(labels[name] for name in instrument.labels))
            total += 1
    seen = values(series, instrument)
    assert len(seen) <= 2_000
    assert sum(seen.values()) == total
    assert any(i.OTHER in labels for labels in seen)
    # The closed labels keep their meaning.
    closed = [n for n, label in enumerate(instrument.labels) if label in i.CLOSED_LABELS]
    assert all(labels[n] != i.OTHER for labels in seen for n in closed)


def test_a_histogram_never_has_more_than_200_label_sets() -> None:
    series = Series()
    for agent in range(100):
        for kind in i.STAGES:
            for outcome in i.OUTCOMES:
                series.histogram(i.NODE_DURATION, (f"a{agent}", kind, outcome), 0).observe(7, 0)
    shown = series.show()[i.NODE_DURATION]
    assert len(shown) <= 200
    assert sum(sum(cell.counts) for cell in shown) == 100 * 3 * 4


def test_births_leave_room_for_what_happens() -> None:
    series = Series()
    for scope in range(100):
        bear_agent(series, f"s{scope}", "support", 0)
        bear_agent(series, f"s{scope}", "writer", 0)
    assert len(series.cells[i.CANCELLATIONS]) <= i.SERIES_BUDGET // 2
    assert series.take_overflows() == {}
    count(series, i.CANCELLATIONS, "s99", "writer", "call_tools", "task")
    assert values(series, i.CANCELLATIONS)["s99", "writer", "call_tools", "task"] == 1


def test_an_idle_agent_is_buried_and_returns_at_zero() -> None:
    series = Series()
    bear_agent(series, "acme", "old", 0)
    series.counter(i.RUNS, ("acme", "old", "completed"), 0).add(5, 0)
    series.counter(i.RUNS, ("acme", "busy", "completed"), 0).add(1, 0)
    series.counter(i.RUNS, ("acme", "busy", "completed"), 0).add(1, 100)
    assert series.retire(50)
    assert values(series, i.RUNS) == {("acme", "busy", "completed"): 2}
    assert "old" not in series.values("agent")
    assert series.counter(i.RUNS, ("acme", "old", "completed"), 60).value == 0


def test_the_zeros_of_a_busy_agent_are_not_buried() -> None:
    series = Series()
    bear_agent(series, "acme", "support", 0)
    series.counter(i.RUNS, ("acme", "support", "completed"), 0).add(1, 100)
    series.retire(50)
    assert values(series, i.RUNS)["acme", "support", "failed"] == 0


def test_a_buried_value_makes_room_under_its_cap() -> None:
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


def test_no_user_session_or_run_is_ever_a_label() -> None:
    labels = {label for instrument in i.CATALOGUE for label in instrument.labels}
    assert not labels & {"user", "user_id", "session", "session_id", "run", "run_id", "instance", "trace_id"}
