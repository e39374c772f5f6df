"""Who is guilty, the fact or the collector: nothing is set aside for a collector that comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from support.made_facts import ended

from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.series import Series
from agx_sidecar.traces import export as export_module
from agx_sidecar.traces.export import Export, Item
from agx_sidecar.traces.spans import spans_of


class Collector(SpanExporter):
    """Takes what `takes` says; `asked` holds the runs of each request."""

    def __init__(self, takes: Callable[[list[str], int], bool]) -> None:
        self._takes = takes
        self.asked: list[list[str]] = []
        self.taken: set[str] = set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        runs = [str((span.attributes or {})["agx.run.id"]) for span in spans]
        self.asked.append(runs)
        if not self._takes(runs, len(self.asked)):
            return SpanExportResult.FAILURE
        self.taken |= set(runs)
        return SpanExportResult.SUCCESS


def item(run_id: str) -> Item:
    fact = ended(run_id, stream=None)
    return Item("queue", f"{run_id}-entry", fact.id, 100, tuple(spans_of(fact)))


@pytest.fixture
def open_export(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Collector], tuple[Export, Series]]]:
    monkeypatch.setattr(export_module, "_FIRST_WAIT", 0.001)
    opened: list[Export] = []

    def open_it(collector: Collector) -> tuple[Export, Series]:
        own = Series()
        opened.append(Export(collector, own))
        return opened[-1], own

    yield open_it
    for each in opened:
        each.close()


def failed(own: Series) -> int:
    return own.counter(i.SPANS_FAILED, (), 0).value


def exported(own: Series) -> int:
    return own.counter(i.SPANS_EXPORTED, (), 0).value


OpenExport = Callable[[Collector], tuple[Export, Series]]
RUNS = [f"r{n}" for n in range(6)]


@pytest.mark.parametrize("guilty", [{"r0"}, {"r3"}, {"r5"}, {"r0", "r1", "r5"}])
async def test_the_guilty_are_found_wherever_they_are(open_export: OpenExport, guilty: set[str]) -> None:
    collector = Collector(lambda runs, _: not guilty & set(runs))
    export, own = open_export(collector)
    done = await export.send([item(run) for run in RUNS])
    assert {each.fact_id for each in done} == {f"{run}:end" for run in RUNS}
    assert collector.taken == set(RUNS) - guilty
    assert failed(own) == len(guilty)
    assert exported(own) == len(RUNS) - len(guilty)
    assert export.down_since is None


async def test_a_collector_that_is_down_is_asked_a_few_times_and_nothing_is_done(open_export: OpenExport) -> None:
    collector = Collector(lambda runs, _: False)
    export, own = open_export(collector)
    assert await export.send([item(run) for run in RUNS]) == []
    assert len(collector.asked) == 3 + 3
    assert export.down_since is not None
    assert (failed(own), exported(own)) == (0, 0)


async def test_a_collector_that_dies_while_facts_go_one_by_one_costs_none(open_export: OpenExport) -> None:
    collector = Collector(lambda runs, n: 3 < n <= 5)
    export, own = open_export(collector)
    done = await export.send([item(run) for run in RUNS])
    assert {each.fact_id for each in done} == {"r0:end", "r1:end"}
    assert failed(own) == 0
    assert export.down_since is not None


async def test_a_refusal_that_passes_costs_nothing(open_export: OpenExport) -> None:
    collector = Collector(lambda runs, n: n > 3 and n != 6)
    export, own = open_export(collector)
    done = await export.send([item(run) for run in RUNS])
    assert len(done) == len(RUNS)
    assert collector.taken == set(RUNS)
    assert (failed(own), exported(own)) == (0, len(RUNS))


async def test_a_fact_alone_is_never_judged(open_export: OpenExport) -> None:
    export, own = open_export(Collector(lambda runs, _: False))
    assert await export.send([item("r0")]) == []
    assert failed(own) == 0


async def test_an_exporter_that_raises_has_refused(open_export: OpenExport) -> None:
    def break_down(runs: list[str], _: int) -> bool:
        if "r2" in runs:
            raise OverflowError("a span that can't be encoded")
        return True

    export, own = open_export(Collector(break_down))
    assert len(await export.send([item(run) for run in RUNS])) == len(RUNS)
    assert failed(own) == 1


async def test_the_end_of_an_outage_is_noticed(open_export: OpenExport) -> None:
    collector = Collector(lambda runs, n: n > 6)
    export, own = open_export(collector)
    assert await export.send([item(run) for run in RUNS]) == []
    assert export.down_since is not None
    assert len(await export.send([item(run) for run in RUNS])) == len(RUNS)
    assert export.down_since is None
    assert exported(own) == len(RUNS)
