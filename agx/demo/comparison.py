"""Compares the finished runs with the sidecar's /metrics: counts have to be equal, durations within half a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from .finished_runs import FinishedRun, FinishedRuns

Labels = tuple[str, ...]
Counts = Counter[Labels]

_CLOCKS = 0.5  # seconds by which a run's duration here and in its own process may differ


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what it counts, the expected and the counted value, and the labels where they differ."""

    what: str
    expected: float
    counted: float
    differences: tuple[str, ...] = ()
    exact: bool = True  # else `expected` is a lower bound

    @property
    def agrees(self) -> bool:
        return not self.differences


@dataclass(frozen=True, slots=True)
class _Sample:
    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class _Check:
    """A metric, summed by some of its labels; the table has one row per value of the last one."""

    title: str
    metric: str
    labels: Labels
    expected: Counts
    exact: bool = True  # else the sidecar may have counted more


def compare(finished_runs: FinishedRuns, exposition: str) -> list[Row]:
    """Return the table. The comparison is by all the labels of a check, the table shows them summed."""
    samples = list(_samples(exposition))
    rows = [row for check in _checks(finished_runs.runs) for row in _rows(check, samples)]
    return [*rows, _duration(finished_runs.runs, samples), _live(samples)]


def _checks(runs: list[FinishedRun]) -> Iterator[_Check]:
    yield _Check(
        "runs started", "agx_runs_started_total", ("scope", "agent"), Counter((r.scope, r.agent) for r in runs)
    )
    yield _Check(
        "runs",
        "agx_runs_total",
        ("scope", "agent", "outcome"),
        Counter((r.scope, r.agent, r.outcome) for r in runs),
    )
    yield _Check(
        "runs resumed by another process",
        "agx_run_resumes_total",
        ("agent",),
        Counter({(agent,): sum(r.resumes for r in runs if r.agent == agent) for agent in {r.agent for r in runs}}),
    )
    yield _Check(
        "cancellations",
        "agx_cancellations_total",
        ("scope", "agent", "reason"),
        Counter((r.scope, r.agent, r.reason) for r in runs if r.reason),
    )
    yield _Check(
        "errors",
        "agx_run_errors_total",
        ("agent", "error_type"),
        Counter((r.agent, r.error_type) for r in runs if r.error_type),
    )
    tools: Counts = Counter()
    tokens: Counts = Counter()
    for r in runs:
        tools.update({(r.agent, tool, outcome): n for (tool, outcome), n in r.tool_calls.items()})
        tokens.update({(r.scope, r.agent, kind): n for kind, n in r.tokens.items()})
    yield _Check("tool calls", "agx_tool_calls_total", ("agent", "tool", "outcome"), tools)
    # Where no usage was received for a cancelled or interrupted answer, agx estimates it, and no exact value is known.
    exact = all(r.all_reported for r in runs)
    yield _Check("tokens", "agx_tokens_total", ("scope", "agent", "type"), tokens, exact=exact)
    if all(r.model_requests is not None for r in runs):
        requests: Counts = Counter({("chat",): sum(r.model_requests or 0 for r in runs)})
        metric = "gen_ai_client_operation_duration_seconds_count"
        yield _Check("model requests", metric, ("gen_ai_operation_name",), requests)


def _rows(check: _Check, samples: list[_Sample]) -> Iterator[Row]:
    counted: Counts = Counter()
    for sample in samples:
        if sample.name == check.metric:
            counted[tuple(sample.labels[label] for label in check.labels)] += int(sample.value)
    # Series are zero-initialized: a zero is the same as no series.
    expected, counted = +check.expected, +counted
    for last in sorted({labels[-1] for labels in expected | counted}):
        mine = Counter({labels: n for labels, n in expected.items() if labels[-1] == last})
        theirs = Counter({labels: n for labels, n in counted.items() if labels[-1] == last})
        differences = tuple(
            f"{check.metric}{{{', '.join(f'{k}={v}' for k, v in zip(check.labels, labels, strict=True))}}}: "
            f"ran {mine[labels]}, counted {theirs[labels]}"
            for labels in sorted({*mine, *theirs})
            if theirs[labels] < mine[labels] or (check.exact and theirs[labels] > mine[labels])
        )
        yield Row(f"{check.title} · {last.rpartition('.')[2]}", mine.total(), theirs.total(), differences, check.exact)


def _duration(runs: list[FinishedRun], samples: list[_Sample]) -> Row:
    """Two processes measure the same times with their own clocks, so the sums are equal but for a little each run."""
    measured: dict[Labels, float] = {}
    for run in runs:
        measured[run.agent, run.outcome] = measured.get((run.agent, run.outcome), 0.0) + run.seconds
    counted: dict[Labels, float] = {
        (sample.labels["agent"], sample.labels["outcome"]): sample.value
        for sample in samples
        if sample.name == "agx_run_duration_seconds_sum"
    }
    ended: Counts = Counter((run.agent, run.outcome) for run in runs)
    differences = tuple(
        f"agx_run_duration_seconds_sum{{agent={agent}, outcome={outcome}}}: ran {seconds:.3f} s, "
        f"counted {counted.get((agent, outcome), 0):.3f} s"
        for (agent, outcome), seconds in measured.items()
        if abs(counted.get((agent, outcome), 0) - seconds) > _CLOCKS * ended[agent, outcome]
    )
    return Row(f"seconds in runs (within {_CLOCKS} s each)", sum(measured.values()), sum(counted.values()), differences)


def _live(samples: Iterable[_Sample]) -> Row:
    live = sum(int(sample.value) for sample in samples if sample.name == "agx_runs_live")
    return Row("runs live now", 0, live, (f"agx_runs_live: {live}, though every run has ended",) if live else ())


def _samples(exposition: str) -> Iterator[_Sample]:
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            yield _Sample(sample.name, sample.labels, sample.value)
