"""What a scraper gets: both formats, checked by promtool and by prometheus_client's own parsers."""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from support.made_facts import TRACE_ID, ended, node, run_of, started, tool

from agx.facts.reader import QueueEntry
from agx.facts.schema import ApprovalDecided, RunFeedback, encode
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.exposition import render
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Sample, Series

TEXT = "text/plain; version=0.0.4"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def snapshot() -> dict[i.Instrument, list[Sample]]:
    """Every instrument of the catalogue, with a cell at least."""
    fold = Fold(Series(), Series(), {0: Position()})
    scored = RunFeedback(id="score", name="helpful", value=1.0, at_ns=1, **run_of())
    decided = ApprovalDecided(id="decided", decision="approved", start_ns=1, end_ns=2, **run_of())
    facts = (
        started(),
        node(),
        tool(),
        scored,
        decided,
        ended(),
        ended("run-2", outcome="failed", error_type='Odd"\nname\\'),
    )
    for n, fact in enumerate(facts):
        fold.apply(0, [QueueEntry(f"1700000000000-{n}", encode(fact))])
    return {
        **{each: [Sample(tuple("x" for _ in each.labels), 1)] for each in i.CATALOGUE if each.kind != "histogram"},
        **{each: [Sample((), 0, (0,) * 15)] for each in (i.APPEND_LATENCY,)},
        **fold.series.sample(),
    }


def test_promtool_finds_nothing_to_say(snapshot: dict[i.Instrument, list[Sample]]) -> None:
    body, _ = render(snapshot, TEXT)
    checked = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_metric_of_the_catalogue_is_there_with_its_labels(snapshot: dict[i.Instrument, list[Sample]]) -> None:
    body, content_type = render(snapshot, TEXT)
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in parse_text(body.decode())}
    for instrument in i.CATALOGUE:
        name = instrument.name.removesuffix("_total") if instrument.kind == "counter" else instrument.name
        family = families.pop(name)
        assert family.type == instrument.kind
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(instrument.labels), sample
    assert families == {}


def test_openmetrics_has_exemplars_and_nothing_created(snapshot: dict[i.Instrument, list[Sample]]) -> None:
    body, content_type = render(snapshot, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert b"_created" not in body
    families = {family.name: family for family in parse_openmetrics(body.decode())}
    exemplars = [
        sample.exemplar
        for sample in families["agx_run_duration_seconds"].samples
        if sample.exemplar and sample.labels["outcome"] == "completed"
    ]
    assert [(exemplar.labels, exemplar.value) for exemplar in exemplars] == [({"trace_id": TRACE_ID}, 2.5)]
    assert float(exemplars[0].timestamp) == 1_700_000_002.5


def test_a_histogram_is_cumulated(snapshot: dict[i.Instrument, list[Sample]]) -> None:
    cell = Sample((), 3_500_000, tuple([2, 0, 1] + [0] * (len(i.APPEND_LATENCY.buckets) - 2)))
    body, _ = render({i.APPEND_LATENCY: [cell]}, TEXT)
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert lines[:3] == [
        'agx_stream_append_latency_seconds_bucket{le="0.0005"} 2.0',
        'agx_stream_append_latency_seconds_bucket{le="0.000707107"} 2.0',
        'agx_stream_append_latency_seconds_bucket{le="0.001"} 3.0',
    ]
    assert lines[-3:] == [
        'agx_stream_append_latency_seconds_bucket{le="+Inf"} 3.0',
        "agx_stream_append_latency_seconds_count 3.0",
        "agx_stream_append_latency_seconds_sum 0.0035",
    ]


def test_buckets_are_those_of_the_conventions() -> None:
    def seconds(instrument: i.Instrument) -> list[float]:
        return [bound / instrument.scale for bound in instrument.buckets]

    assert seconds(i.OPERATION_DURATION) == [
        0.01,
        0.02,
        0.04,
        0.08,
        0.16,
        0.32,
        0.64,
        1.28,
        2.56,
        5.12,
        10.24,
        20.48,
        40.96,
        81.92,
    ]
    assert (
        seconds(i.TOOL_DURATION) == seconds(i.FIRST_CHUNK) == seconds(i.OUTPUT_CHUNK) == seconds(i.OPERATION_DURATION)
    )
    assert seconds(i.INVOKE_DURATION) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 409.6]
    assert seconds(i.TOKEN_USAGE)[0] == 1
    assert seconds(i.TOKEN_USAGE)[-1] == 67_108_864
    assert seconds(i.INFERENCE_CALLS) == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    "histogram",
    [each for each in i.CATALOGUE if each.kind == "histogram" and each.name.startswith("agx_") and each is not i.SCORE],
    ids=lambda each: each.name,
)
def test_buckets_of_our_own_have_steps_of_the_root_of_two(histogram: i.Instrument) -> None:
    steps = [above / below for below, above in itertools.pairwise(histogram.buckets)]
    assert steps == pytest.approx([2**0.5] * len(steps), rel=1e-5)


def test_a_sum_never_falls_by_rounding() -> None:
    """The same integer is always the same float, and more is never less: what floats added up can't promise."""
    values = [0, 1, 10**9 - 1, 10**9, 10**9 + 1, 2**53, 2**53 + 1, 2**63, 2**63 + 12_345, 10**24]
    rendered = []
    for value in values:
        body, _ = render({i.COST: [Sample(tuple("abcd"), value)]}, TEXT)
        found = re.search(rb"} (\S+)$", body, re.MULTILINE)
        assert found
        rendered.append(float(found[1]))
    assert all(before <= after for before, after in itertools.pairwise(rendered))
    assert rendered[3] == 1.0


async def test_facts_are_folded_while_a_page_is_rendered() -> None:
    """How long the longest pause is, `python -m benchmarks.sidecar` measures."""
    fold = Fold(Series(), Series(), {0: Position()})
    for scope, agent in itertools.product(range(60), range(30)):
        names = {"scope": f"s{scope}", "agent": f"a{agent}"}
        fold.apply(0, [QueueEntry(f"1700000000000-{scope * 30 + agent}", encode(ended(f"{scope}-{agent}", **names)))])
    snapshot = fold.series.sample()
    alone, _ = render(snapshot, TEXT)
    assert alone.count(b"\n") > 5_000

    scrape = asyncio.create_task(asyncio.to_thread(render, snapshot, TEXT))
    folded = 0
    while not scrape.done():
        fold.apply(0, [QueueEntry(f"1700000000001-{folded}", encode(ended(f"new-{folded}")))])
        folded += 1
        await asyncio.sleep(0)
    assert folded > 20
    assert (await scrape)[0] == alone  # all of the moment at which it was taken
