"""The metric state: written and read back whole, and told apart when it is damaged or newer."""

from __future__ import annotations

import zlib

import pytest
from support.made_facts import beat, ended, node, started, tool

from agx.facts.schema import encode
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.exposition import render
from agx_sidecar.metrics.fold import Fold, Position, TracesTrims
from agx_sidecar.metrics.series import Counter, Series
from agx_sidecar.metrics.state import (
    HEADER_LENGTH,
    RELEASED,
    Header,
    UnreadableStateError,
    dump,
    load,
    pack,
    parse_header,
)


def a_fold() -> Fold:
    fold = Fold(Series(), Series(), {0: Position(), 3: Position("7-1", 12, 4, TracesTrims(3, 2, 1))})
    for n, fact in enumerate((started(), node(), tool(), ended(), beat())):
        fold.apply(0, f"1700000000000-{n}", encode(fact))
    return fold


def test_a_state_comes_back_as_it_was() -> None:
    fold = a_fold()
    series, positions = load(pack(dump(fold.series, fold.positions)))
    assert positions == fold.positions
    assert positions[3].traces.total == 3
    text = "text/plain; version=0.0.4"
    assert render(series.show(), text) == render(fold.series.show(), text)
    assert series.values("scope") == {"acme"}


def test_a_successor_counts_on() -> None:
    fold = a_fold()
    series, positions = load(pack(dump(fold.series, fold.positions)))
    successor = Fold(series, Series(), positions)
    successor.apply(0, "1700000000001-0", encode(ended("run-2")))
    cell = successor.series.counter(i.RUNS, ("acme", "support", "completed"), 0)
    assert cell.value == 2


def test_integers_of_any_size_survive() -> None:
    series = Series()
    big = 2**64 + 12_345_678_901
    series.counter(i.COST, ("a", "b", "c"), 0).value = big
    series.histogram(i.RUN_DURATION, ("a", "completed"), 0).sum = big
    again, _ = load(pack(dump(series, {})))
    cost = again.cells[i.COST]["a", "b", "c"]
    assert isinstance(cost, Counter)
    assert cost.value == big
    assert again.histogram(i.RUN_DURATION, ("a", "completed"), 0).sum == big


def test_a_metric_that_no_longer_exists_is_left_out() -> None:
    body = zlib.compress(b'{"positions":{},"series":{"agx_gone_total":[[["x"],0,5]]}}')
    series, _ = load(body)
    assert series.cells == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        zlib.compress(b"[]"),
        zlib.compress(b"{}"),
        zlib.compress(b'{"positions":{"0":["1-1"]},"series":{}}'),
        zlib.compress(b'{"positions":{},"series":{"agx_runs_total":[[["one label"],0,5]]}}'),
        zlib.compress(b'{"positions":{},"series":{"agx_stream_append_latency_seconds":[[[],0,5,[1,2]]]}}'),
        zlib.compress(b'{"positions":{},"series":{"agx_runs_total":7}}'),
    ],
)
def test_a_damaged_state_is_told(body: bytes) -> None:
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
def test_what_has_no_header_is_told(data: bytes) -> None:
    with pytest.raises(UnreadableStateError):
        parse_header(data)
