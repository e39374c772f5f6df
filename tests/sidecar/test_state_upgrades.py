"""The metric state through upgrades and downgrades: a metric whose row changed changes, nothing else moves."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter as Totals
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.made_facts import ended, node, started, tool

from agx.facts.reader import QueueEntry
from agx.facts.schema import Service, encode
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics import table as t
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.gauges import TracesTrims
from agx_sidecar.metrics.series import Counter, Series
from agx_sidecar.metrics.state import HEADER_LENGTH, State, dump, load, pack, parse_header
from agx_sidecar.metrics.state_0_2 import SHAPES
from agx_sidecar.metrics.table import Instrument, counter

STORED = (Path(__file__).parent / "data" / "state-0.2.0.bin").read_bytes()
BODY = STORED[HEADER_LENGTH:]

Cells = dict[str, dict[tuple[str, ...], tuple[int, int, list[int]]]]  # by metric and labels: touched, value, counts


def read_as_0_2(body: bytes) -> tuple[dict[int, list[Any]], Cells]:
    """Read a state as the code of 0.2.0 does: a metric of another shape than its own spoils all of it.

    The number of labels and buckets that 0.2.0 has is that of the stored state.
    """
    raw = orjson.loads(zlib.decompress(body))
    own = {
        name: (len(cells[0][0]), len(cells[0][3]) if len(cells[0]) > 3 else 0)
        for name, cells in orjson.loads(zlib.decompress(BODY))["series"].items()
    }
    found: Cells = {}
    for name, cells in raw["series"].items():
        if name not in own:
            continue
        for labels, touched, value, *rest in cells:
            assert (len(labels), len(rest[0]) if rest else 0) == own[name], f"0.2.0 would throw everything away: {name}"
            counts = [int(count) for count in rest[0]] if rest else []
            found.setdefault(name, {})[tuple(labels)] = (int(touched), int(value), counts)
    for at in raw["positions"].values():
        assert len(at) == 6
    return {int(n): at for n, at in raw["positions"].items()}, found


def cells_of(series: Series) -> Cells:
    return {
        instrument.name: {
            labels: (cell.touched, cell.value, [])
            if isinstance(cell, Counter)
            else (cell.touched, cell.sum, cell.counts)
            for labels, cell in cells.items()
        }
        for instrument, cells in series.cells.items()
    }


def totals(cells: Cells) -> dict[str, tuple[int, int]]:
    """Sum and number of observations of each metric, over all of its series."""
    return {
        name: (sum(value for _, value, _ in of.values()), sum(sum(counts) for _, _, counts in of.values()))
        for name, of in cells.items()
    }


def observed(cells: Cells, but: set[str]) -> Cells:
    """The series that something was counted in; more may be there at zero."""
    return {
        name: kept
        for name, of in cells.items()
        if name not in but and (kept := {labels: cell for labels, cell in of.items() if cell[1] or any(cell[2])})
    }


def named(table: Sequence[Instrument], name: str) -> Instrument:
    return next(each for each in table if each.name == name)


def as_in_0_2(instrument: Instrument) -> Instrument:
    labels, buckets = SHAPES[instrument.name]
    by = tuple(label for label in instrument.by if label.name in labels.split())
    return dataclasses.replace(instrument, by=by, buckets=buckets)


# The table of 0.2.0, whatever has been added since.
TABLE = tuple(as_in_0_2(each) for each in i.CATALOGUE if each.name in SHAPES)


def row(name: str) -> Instrument:
    return named(TABLE, getattr(i, name).name)


def changed_table(**changes: Any) -> tuple[Instrument, ...]:
    """The table with rows changed: by the name of the row, what differs, or None where it is removed."""
    rows = {row(name): change for name, change in changes.items()}
    return tuple(
        dataclasses.replace(each, **rows.get(each, {})) if each in rows else each
        for each in TABLE
        if rows.get(each, {}) is not None
    )


WITH_SERVICE = changed_table(
    RUNS={"by": (*row("RUNS").by, t.SERVICE)},
    COST={"by": (*row("COST").by, t.SERVICE)},
    TOKENS={"by": (*row("TOKENS").by, t.SERVICE)},
    OPERATION_DURATION={"by": (*row("OPERATION_DURATION").by, t.AGENT_NAME)},
)
RELABELLED = {"agx_runs_total", "agx_cost_usd_total", "agx_tokens_total", "gen_ai_client_operation_duration_seconds"}


def test_a_state_of_0_2_0_is_read_whole() -> None:
    assert parse_header(STORED).epoch == 7
    state = load(BODY, TABLE)
    _, cells = read_as_0_2(BODY)
    assert cells_of(state.series) == cells
    assert set(cells) == set(SHAPES), "the stored state has every metric"
    assert state.positions[1] == Position("1699999999999-5", 77, 4)
    assert state.traces_trims[1] == TracesTrims(3, 2, 1)
    assert state.positions[0].count == 60 * 6 + 5
    assert not state.foreign


def test_0_2_0_reads_what_this_version_writes() -> None:
    written = pack(dump(load(BODY, TABLE)))
    assert read_as_0_2(written) == read_as_0_2(BODY)


def test_an_added_label_loads_old_series_under_the_empty_value_and_moves_nothing_else() -> None:
    before = cells_of(load(BODY, TABLE).series)
    after = cells_of(load(BODY, WITH_SERVICE).series)
    for name, cells in before.items():
        expected = {(*labels, ""): cell for labels, cell in cells.items()} if name in RELABELLED else cells
        assert after[name] == expected, name


def test_0_2_0_can_lead_after_a_version_with_more_labels() -> None:
    state = load(BODY, WITH_SERVICE)
    fold = Fold(state.series, Series(), state.positions, WITH_SERVICE)
    fold.apply(0, [QueueEntry("1700000001000-0", encode(node()))])
    written = pack(dump(state))
    _, cells = read_as_0_2(written)
    assert totals(cells) == totals(cells_of(state.series))
    assert cells_of(load(written, WITH_SERVICE).series) == cells_of(state.series)


def test_a_removed_label_is_summed() -> None:
    table = changed_table(TOOL_CALLS={"by": (t.TOOL, t.TOOL_OUTCOME)})
    before, after = cells_of(load(BODY, TABLE).series), cells_of(load(BODY, table).series)
    name = "agx_tool_calls_total"
    expected = Totals[tuple[str, ...]]()
    for (_, *rest), (_, value, _) in before.pop(name).items():
        expected[tuple(rest)] += value
    assert {labels: value for labels, (_, value, _) in after.pop(name).items()} == expected
    assert after == before


def test_changed_buckets_restart_that_metric_only() -> None:
    buckets = tuple(bound + 1 for bound in row("RUN_DURATION").buckets)  # as many as before
    table = changed_table(RUN_DURATION={"buckets": buckets}, TOKEN_USAGE={"buckets": (1, 10)})
    before, state = cells_of(load(BODY, TABLE).series), load(BODY, table)
    after = cells_of(state.series)
    for name in ("agx_run_duration_seconds", "gen_ai_client_token_usage"):
        del before[name]
        assert name not in after
    assert after == before
    fold = Fold(state.series, Series(), state.positions, table)
    fold.apply(0, [QueueEntry("1700000001000-0", encode(ended()))])
    written = pack(dump(state))
    assert "agx_run_duration_seconds" not in read_as_0_2(written)[1]
    again = load(written, table).series
    assert again.histogram(named(table, "agx_run_duration_seconds"), "support", "completed").sum == 2_500_000_000


NEW = counter("agx_new_total", (t.SCOPE,), "New.", source=t.RUN_ENDED, value=attrgetter("model_calls"))


def test_a_metric_of_a_newer_version_survives_an_older_leader() -> None:
    newer = (*TABLE, NEW)
    state = load(BODY, newer)
    assert NEW not in state.series.cells
    state.series.now = 1_700_000_001
    state.series.counter(NEW, "acme").add(5)
    older = load(pack(dump(state)), TABLE)
    assert set(older.foreign) == {"agx_new_total"}
    assert "agx_new_total" not in cells_of(older.series)
    again = load(pack(dump(older)), newer)
    assert again.series.counter(NEW, "acme").value == 5
    assert not again.foreign


def test_a_removed_metric_is_not_shown_and_goes_when_it_was_idle_for_a_day() -> None:
    without = changed_table(LISTENER_GAPS=None)
    state = load(BODY, without)
    assert "agx_listener_gaps_total" not in cells_of(state.series)
    assert state.foreign["agx_listener_gaps_total"][1]
    state.series.now = 1_700_000_000 + 2 * t.SERIES_IDLE
    state.series.counter(row("RUNS"), "acme", "support", "completed").add()
    assert not load(pack(dump(state)), without).foreign["agx_listener_gaps_total"][1]


@pytest.mark.parametrize("spoil", [[[["one label"], 0, 5]], [[["a", "b", "c"], 0, "x"]], 7, [[]], [[["a"] * 3, 0]]])
def test_a_damaged_metric_restarts_alone(spoil: Any, caplog: pytest.LogCaptureFixture) -> None:
    raw = json.loads(zlib.decompress(BODY))
    raw["series"]["agx_runs_total"] = spoil
    before, after = cells_of(load(BODY, TABLE).series), cells_of(load(zlib.compress(orjson.dumps(raw)), TABLE).series)
    assert not after.pop("agx_runs_total", None)
    del before["agx_runs_total"]
    assert after == before
    assert "agx_runs_total restarts" in caplog.text


def as_0_2(body: bytes) -> bytes:
    """What 0.2.0 writes after it has read a state: nothing that it does not know."""
    positions, cells = read_as_0_2(body)
    series = {
        name: [[labels, touched, value, counts] if counts else [labels, touched, value]
               for labels, (touched, value, counts) in of.items()]
        for name, of in cells.items()
    }  # fmt: skip
    return zlib.compress(orjson.dumps({"positions": {str(n): at for n, at in positions.items()}, "series": series}))


def test_versions_that_alternate_neither_lose_nor_double_anything() -> None:
    """0.2.0 and a version with more labels, other buckets and a new metric lead in turn; each counts ten runs."""
    newer = (*changed_table(
        RUNS={"by": (*row("RUNS").by, t.SERVICE)},
        COST={"by": (*row("COST").by, t.SERVICE)},
        RUN_DURATION={"buckets": row("RUN_DURATION").buckets[:5]},
    ), NEW)  # fmt: skip
    truth = Fold(Series(), Series(), {0: Position()}, TABLE)
    body = pack(dump(State(positions={0: Position()})))
    highest: dict[tuple[str, tuple[str, ...]], int] = {}
    for turn in range(6):
        is_old = turn % 2 == 0
        state = load(as_0_2(body) if is_old else body, TABLE if is_old else newer)
        fold = Fold(state.series, Series(), state.positions, TABLE if is_old else newer)
        for n in range(10):
            run_id, service = f"{turn}-{n}", Service(f"service-{n % 2}")
            facts = [made(run_id, service=service) for made in (started, node, tool, ended)]
            entries = [
                QueueEntry(f"{1_700_000_000_000 + turn}-{n * 4 + k}", encode(each)) for k, each in enumerate(facts)
            ]
            truth.apply(0, entries)
            fold.apply(0, entries)
        fold.touch()
        truth.touch()
        assert state.positions == truth.positions
        changed = {"agx_run_duration_seconds", "agx_new_total", "agx_runs_total", "agx_cost_usd_total"}
        cells, expected = cells_of(state.series), cells_of(truth.series)
        assert observed(cells, but=changed) == observed(expected, but=changed)
        # The totals of the relabelled ones are exact all the time, too.
        for name in ("agx_runs_total", "agx_cost_usd_total"):
            assert totals(cells)[name] == totals(expected)[name]
        for name, of in cells.items():
            for labels, (_, value, _) in of.items():
                if name not in changed:
                    assert value >= highest.get((name, labels), 0)
                    highest[name, labels] = value
        body = pack(dump(state))


def test_two_versions_with_shapes_keep_each_others_metrics() -> None:
    newer = (*WITH_SERVICE, NEW)
    state = load(BODY, newer)
    before = totals(cells_of(state.series))
    for table in (TABLE, newer, TABLE, newer):
        state = load(pack(dump(state)), table)
        assert totals(cells_of(state.series)) == before
