"""Which facts are dropped: those that the collector refuses, and none for a collector that comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from support.made_facts import ended

from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.series import Series
from agx_sidecar.traces import export as export_module
from agx_sidecar.traces.export import Export, Item
from agx_sidecar.traces.otlp import Answer, Verdict
from agx_sidecar.traces.spans import spans_of

TAKEN, REFUSED, FAILED, UNAVAILABLE = Verdict.TAKEN, Verdict.REFUSED, Verdict.FAILED, Verdict.UNAVAILABLE
RUNS = [f"r{n}" for n in range(6)]


class Collector:
    """Answers what `answer` returns for the runs of a request and its number, from 1."""

    def __init__(self, answer: Callable[[set[str], int], Verdict | Answer]) -> None:
        self._answer = answer
        self.requests: list[set[str]] = []
        self.taken: set[str] = set()

    def send(self, spans: Sequence[ReadableSpan]) -> Answer:
        runs = {str((span.attributes or {})["agx.run.id"]) for span in spans}
        self.requests.append(runs)
        answer = self._answer(runs, len(self.requests))
        answer = Answer(answer) if isinstance(answer, Verdict) else answer
        if answer.verdict is TAKEN:
            self.taken |= runs
        return answer

    def cut(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is open."""


def item(run_id: str) -> Item:
    fact = ended(run_id, stream=None)
    return Item("queue", f"{run_id}-entry", fact.id, 100, tuple(spans_of(fact)))


def items(runs: Sequence[str] = RUNS) -> list[Item]:
    return [item(run) for run in runs]


def open_export(collector: Collector) -> tuple[Export, Series]:
    own = Series()
    return Export(collector, own, timeout=30), own


def failed(own: Series) -> int:
    return own.counter(i.SPANS_FAILED).value


def exported(own: Series) -> int:
    return own.counter(i.SPANS_EXPORTED).value


def last_success(own: Series) -> int:
    return own.counter(i.EXPORT_SUCCESS).value


async def test_the_time_of_the_last_success_is_exported_before_there_is_one() -> None:
    _, own = open_export(Collector(lambda runs, _: TAKEN))
    assert [(each.labels, each.value) for each in own.sample()[i.EXPORT_SUCCESS]] == [((), 0)]


@pytest.mark.parametrize("bad", [{"r0"}, {"r3"}, {"r5"}, {"r0", "r1", "r5"}, set(RUNS)])
async def test_refused_facts_are_found_wherever_they_are(bad: set[str]) -> None:
    collector = Collector(lambda runs, _: REFUSED if bad & runs else TAKEN)
    export, own = open_export(collector)
    done = await export.send(items())
    assert {each.fact_id for each in done} == {f"{run}:end" for run in RUNS}
    assert collector.taken == set(RUNS) - bad
    assert failed(own) == len(bad)
    assert exported(own) == len(RUNS) - len(bad)
    assert export.down_since is None


async def test_one_refused_fact_of_a_whole_batch_costs_few_requests() -> None:
    runs = [f"r{n}" for n in range(512)]
    collector = Collector(lambda runs, _: REFUSED if "r300" in runs else TAKEN)
    export, own = open_export(collector)
    assert len(await export.send(items(runs))) == 512
    assert (failed(own), exported(own)) == (1, 511)
    assert len(collector.requests) <= 2 * 9 + 1  # two halves at each step of the search


@pytest.mark.parametrize("bad", [{"r0"}, {"r3"}, {"r0", "r1", "r4"}])
async def test_facts_at_which_the_collector_fails_are_dropped_once_it_takes_others(bad: set[str]) -> None:
    collector = Collector(lambda runs, _: FAILED if bad & runs else TAKEN)
    export, own = open_export(collector)
    assert len(await export.send(items())) == len(RUNS)
    assert (failed(own), exported(own)) == (len(bad), len(RUNS) - len(bad))


async def test_the_last_fact_waits_until_another_one_is_taken_after_it() -> None:
    collector = Collector(lambda runs, _: FAILED if "r5" in runs else TAKEN)
    export, own = open_export(collector)
    assert len(await export.send(items())) == 5
    assert await export.send([item("r5")]) == []
    assert failed(own) == 0
    assert len(await export.send([item("r5"), item("r6")])) == 2
    assert (failed(own), exported(own)) == (1, 6)


@pytest.mark.parametrize("verdict", [FAILED, UNAVAILABLE])
async def test_a_collector_that_is_down_gets_few_requests_and_nothing_is_done(verdict: Verdict) -> None:
    collector = Collector(lambda runs, _: verdict)
    export, own = open_export(collector)
    assert await export.send(items([f"r{n}" for n in range(512)])) == []
    assert len(collector.requests) < 20
    assert export.down_since is not None
    assert (failed(own), exported(own), last_success(own)) == (0, 0, 0)


@pytest.mark.parametrize("verdict", [FAILED, UNAVAILABLE])
async def test_a_collector_that_dies_during_the_search_costs_nothing(verdict: Verdict) -> None:
    collector = Collector(lambda runs, n: TAKEN if n in (3, 5) else FAILED if n < 5 else verdict)
    export, own = open_export(collector)
    done = await export.send(items())
    assert {each.fact_id.removesuffix(":end") for each in done} >= collector.taken
    assert failed(own) <= 1  # the one fact that failed between two that were taken
    assert len(done) < len(RUNS)


async def test_a_failure_that_passes_costs_nothing() -> None:
    collector = Collector(lambda runs, n: TAKEN if n > 1 else FAILED)
    export, own = open_export(collector)
    assert len(await export.send(items())) == len(RUNS)
    assert (failed(own), exported(own)) == (0, len(RUNS))


@pytest.mark.parametrize(("rejected", "counted"), [(2, 2), (6, 6), (1_000_000, 6)])
async def test_spans_of_a_batch_that_is_taken_in_part_are_counted(
    caplog: pytest.LogCaptureFixture, rejected: int, counted: int
) -> None:
    collector = Collector(lambda runs, _: Answer(TAKEN, rejected, "too old"))
    export, own = open_export(collector)
    for _ in range(3):
        assert len(await export.send(items())) == len(RUNS)  # OTLP: what was answered so is not sent again
    assert (failed(own), exported(own)) == (3 * counted, 3 * (len(RUNS) - counted))
    assert (last_success(own) > 0) == (counted < len(RUNS))
    assert caplog.text.count("too old") == 1  # not one line for each batch


async def test_the_end_of_an_outage_is_noticed() -> None:
    collector = Collector(lambda runs, n: TAKEN if n > 1 else UNAVAILABLE)
    export, own = open_export(collector)
    assert await export.send(items()) == []
    assert export.down_since is not None
    assert len(await export.send(items())) == len(RUNS)
    assert export.down_since is None
    assert exported(own) == len(RUNS)


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """Set when the test ends, so that its threads do."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_request_that_can_not_be_ended_is_left_and_nothing_is_sent_beside_it(
    monkeypatch: pytest.MonkeyPatch, stuck: threading.Event
) -> None:
    monkeypatch.setattr(export_module, "_GRACE", 0.0)

    def hold_first(runs: set[str], n: int) -> Verdict:
        if n == 1:
            stuck.wait(30)
        return TAKEN

    collector = Collector(hold_first)
    export = Export(collector, Series(), timeout=0.05)
    for _ in range(3):
        assert await export.send(items()) == []
    assert len(collector.requests) == 1
    stuck.set()
    for _ in range(100):
        if await export.send(items()):
            break
    assert len(collector.requests) == 2
