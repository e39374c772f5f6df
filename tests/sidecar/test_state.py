"""The metric state: written and read back whole, refused where it is damaged."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
from support.made_facts import ended, heartbeat, node, started, tool

from agx.facts.reader import QueueEntry
from agx.facts.schema import encode
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics import table as t
from agx_sidecar.metrics.exposition import render
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.gauges import TracesTrims
from agx_sidecar.metrics.series import Series
from agx_sidecar.metrics.state import (
    HEADER_LENGTH,
    RELEASED,
    Header,
    State,
    UnreadableStateError,
    dump,
    load,
    pack,
    parse_header,
)


def a_state() -> State:
    state = State(
        positions={0: Position(), 3: Position("7-1", 12, 4)},
        traces_trims={3: TracesTrims(3, 2, 1)},
    )
    fold = Fold(state.series, Series(), state.positions)
    for n, fact in enumerate((started(), node(), tool(), ended(), heartbeat())):
        fold.apply(0, [QueueEntry(f"1700000000000-{n}", encode(fact))])
    return state


def test_a_state_comes_back_as_it_was() -> None:
    state = a_state()
    again = load(pack(dump(state)))
    assert again.positions == state.positions
    assert again.traces_trims[3] == TracesTrims(3, 2, 1)
    text = "text/plain; version=0.0.4"
    assert render(again.series.sample(), text) == render(state.series.sample(), text)
    assert again.series.values(t.SCOPE) == {"acme"}


def test_a_successor_counts_on() -> None:
    state = load(pack(dump(a_state())))
    successor = Fold(state.series, Series(), state.positions)
    successor.apply(0, [QueueEntry("1700000000001-0", encode(ended("run-2")))])
    (runs,) = [sample for sample in state.series.sample()[i.RUNS] if "completed" in sample.labels]
    assert runs.value == 2


def test_integers_of_any_size_survive() -> None:
    series = Series()
    big = 2**64 + 12_345_678_901
    series.counter(i.COST, *"abcd").value = big
    duration = series.histogram(i.RUN_DURATION, "a", "completed", "shop")
    duration.sum = duration.counts[3] = big
    again = load(pack(dump(State(series)))).series
    assert again.counter(i.COST, *"abcd").value == big
    loaded = again.histogram(i.RUN_DURATION, "a", "completed", "shop")
    assert (loaded.sum, loaded.counts) == (big, duration.counts)


def test_a_metric_that_nobody_knows_is_left_out() -> None:
    body = zlib.compress(b'{"positions":{},"series":{"agx_gone_total":[[["x"],0,5]]}}')
    state = load(body)
    assert state.series.cells == {}
    assert state.foreign == {}


def test_a_compressed_bomb_is_refused_without_being_unpacked() -> None:
    bomb = zlib.compress(b" " * 200 * 2**20)
    assert len(bomb) < 2**18
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableStateError, match="bytes"):
            load(bomb)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        zlib.compress(b"[]"),
        zlib.compress(b"{}"),
        zlib.compress(b'{"positions":{"0":["1-1"]},"series":{}}'),
        zlib.compress(b'{"positions":{},"series":7}'),
        zlib.compress(b'{"positions":{},"series":{},"shapes":{"agx_runs_total":7}}'),
        zlib.compress(b'{"positions":{},"series":{}}')[:-6],
    ],
)
def test_a_damaged_state_is_reported(body: bytes) -> None:
    with pytest.raises(UnreadableStateError):
        load(body)


def test_the_header_stands_where_scripts_look_for_it() -> None:
    header = Header(123, "a" * 32)
    encoded = header.encode()
    assert len(encoded) == HEADER_LENGTH
    assert int(encoded[15:31]) == 123  # what Lua calls string.sub(seen, 16, 31)
    assert parse_header(encoded + b"body") == header
    assert parse_header(Header(1, RELEASED).encode()).owner == RELEASED


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"agx-state 0001 what 123\n", b"agx-state"])
def test_what_has_no_header_is_reported(data: bytes) -> None:
    with pytest.raises(UnreadableStateError):
        parse_header(data)
