"""Facts that are well-formed and say anything: no crash, no page that can't be parsed, no counter that falls."""

from __future__ import annotations

import copy
import json
from typing import Any

import orjson
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from support.made_facts import ended, heartbeat, node, started, tool

from agx.facts.decoding import decode
from agx.facts.reader import QueueEntry
from agx.facts.schema import encode
from agx_sidecar.metrics.exposition import render
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Histogram, Series
from agx_sidecar.metrics.state import State, dump, load, pack
from agx_sidecar.traces.spans import spans_of

FACTS = [orjson.loads(encode(fact)) for fact in (started(), node(), tool(), ended(), heartbeat())]

numbers = st.one_of(st.integers(), st.integers(2**60, 2**70), st.integers(-(10**30), 10**400))
texts = st.one_of(st.text(max_size=30), st.sampled_from(["", "\n", '"', "\\", "a" * 10_000, "\x00\r\u2028", "0" * 32]))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all numbers and texts in a fact."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in leaves(inner, (*path, name))]
    if isinstance(value, list):
        return [leaf for n, inner in enumerate(value) for leaf in leaves(inner, (*path, n))]
    return [path]


@st.composite
def hostile_facts(draw: st.DrawFn) -> bytes:
    """A good fact with some leaves replaced by values of the same type."""
    fact = copy.deepcopy(draw(st.sampled_from(FACTS)))
    for path in draw(st.lists(st.sampled_from(leaves(fact)), max_size=4)):
        *outer, last = path
        place = fact
        for step in outer:
            place = place[step]
        old = place[last]
        place[last] = draw(
            st.booleans() if isinstance(old, bool) else numbers if isinstance(old, int) else st.none() | texts
        )
    # Not orjson: integers of any size are a stranger's right.
    return json.dumps(fact).encode("utf-8", "surrogatepass")


def totals(fold: Fold) -> dict[tuple[str, tuple[str, ...]], int]:
    found = {}
    for instrument, cells in fold.series.cells.items():
        for labels, cell in cells.items():
            found[instrument.name, labels] = sum(cell.counts) if isinstance(cell, Histogram) else cell.value
    return found


@given(st.lists(hostile_facts(), min_size=1, max_size=6))
def test_whatever_a_fact_says_the_pages_parse_and_nothing_falls(payloads: list[bytes]) -> None:
    fold = Fold(Series(), Series(), {0: Position()})
    before: dict[tuple[str, tuple[str, ...]], int] = {}
    for n, payload in enumerate(payloads):
        fold.apply(0, [QueueEntry(f"1700000000000-{n}", payload)])
        after = totals(fold)
        assert all(after[key] >= value for key, value in before.items())
        before = after
    assert fold.positions[0].count == len(payloads)
    samples = fold.series.sample()
    text, _ = render(samples, "text/plain")
    openmetrics, _ = render(samples, "application/openmetrics-text; version=1.0.0")
    families = {instrument.name.removesuffix("_total") for instrument in samples}
    assert {family.name for family in parse_text(text.decode())} == families
    assert {family.name for family in parse_openmetrics(openmetrics.decode())} == families
    state = load(pack(dump(State(fold.series, fold.positions))))
    assert render(state.series.sample(), "text/plain") == render(samples, "text/plain")


@example(encode(node()).replace(b'"first_chunk_ns":150000000', b'"first_chunk_ns":1' + b"0" * 400))
@given(hostile_facts())
def test_whatever_a_fact_says_its_spans_are_made_or_refused_with_a_value_error(payload: bytes) -> None:
    try:
        spans_of(decode(payload))
    except ValueError:
        return


@given(st.one_of(st.binary(max_size=200), st.text(max_size=50).map(str.encode)))
def test_whatever_stands_in_the_queue_is_passed_over(payload: bytes) -> None:
    fold = Fold(Series(), Series(), {0: Position()})
    fold.apply(0, [QueueEntry("1700000000000-0", payload)])
    assert fold.positions[0].count == 1
