"""Compares what Prometheus stored with the ledger, series by series and sample by sample."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from support.waiting import wait_until_sync

from agx_sidecar.metrics.instruments import CATALOGUE
from agx_sidecar.semconv import HIDDEN
from dashboards.preview.stack import Stack

from .ledger import Ledger, Series, series_of
from .world import PLAIN, RELABELLED

MOST_INCREASE = 1.1  # of the truth; `increase()` extrapolates
_SETTLE = 30.0  # seconds for the last scrapes, of all names together
_SHOWN = 5  # differences of one name that are said
_SLACK = 10  # seconds
_OF_TARGETS = frozenset({"__name__", "job", "instance", "pod", "container"})

# The names of all counters and histograms of the fleet, and how many of their integers make one of their units.
SCALES = {
    name: 1 if name.endswith(("_count", "_bucket")) else instrument.scale
    for instrument in CATALOGUE
    if instrument.fleet and instrument.kind != "gauge" and instrument not in HIDDEN["current"]
    for name in (
        [instrument.name]
        if instrument.kind == "counter"
        else [instrument.name + suffix for suffix in ("_count", "_sum", "_bucket")]
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """One name, summed over its series, in its unit but for the increases."""

    name: str
    series: int
    truth: Decimal
    plain: Decimal
    relabelled: Decimal
    samples: int
    resets: int
    increase: float
    increase_plain: float


@dataclass
class Verdict:
    """What was found; nothing is `broken` where all held."""

    rows: list[Row] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def judge(ledger: Ledger, stack: Stack, began: float) -> Verdict:
    """Compare once Prometheus shows the ledger's values, or no longer waits for them."""
    verdict = Verdict()
    stray = {name for name, _ in ledger.truth} - set(SCALES)
    verdict.broken += [f"{name}: in the ledger, and not exported" for name in sorted(stray)]
    until = time.monotonic() + _SETTLE
    for name in SCALES:
        _settle(name, ledger, stack, max(0.0, until - time.monotonic()))
        window = f"{math.ceil(time.time() - began) + _SLACK}s"
        verdict.rows.append(_judge_name(name, ledger, stack, window, verdict.broken))
    return verdict


def _settle(name: str, ledger: Ledger, stack: Stack, timeout: float) -> None:
    def settled() -> bool:
        for job in (PLAIN, RELABELLED):
            assert not list(differences(name, ledger.truth, _shown(name, job, stack)))
        return True

    try:
        wait_until_sync(settled, timeout)
    except AssertionError:
        return  # what differs is said by the comparison itself


def _judge_name(name: str, ledger: Ledger, stack: Stack, window: str, broken: list[str]) -> Row:
    shown = {job: _shown(name, job, stack) for job in (PLAIN, RELABELLED)}
    samples = 0
    for job, of_job in shown.items():
        lines = [*differences(name, ledger.truth, of_job)]
        traces = _samples(name, job, stack, window)
        lines += [*missteps(traces, ledger.truth)]
        samples += sum(map(len, traces.values()))
        broken += [f"{name} ({job}): {line}" for line in lines[:_SHOWN]]
    resets = sum(int(each["value"][1]) for each in stack.query(f'resets({name}{{job="{RELABELLED}"}}[{window}])'))
    if resets:
        broken.append(f"{name}: {resets} resets over the relabelled series")
    increases = {job: _increase(name, job, stack, window) for job in shown}
    truth = Decimal(ledger.total(name)) / SCALES[name]
    if increases[RELABELLED] > MOST_INCREASE * float(truth):
        broken.append(f"{name}: sum(increase()) is {increases[RELABELLED]} of {truth}")
    totals = {job: Decimal(sum(of_job.values())) / SCALES[name] for job, of_job in shown.items()}
    return Row(name, len(shown[RELABELLED]), truth, totals[PLAIN], totals[RELABELLED], samples, resets,
               increases[RELABELLED], increases[PLAIN])  # fmt: skip


def differences(name: str, truth: Mapping[Series, int], shown: Mapping[Series, int]) -> Iterator[str]:
    """Yield every series of a name whose value is not the truth; one that nothing happened to is 0 or not there."""
    for series in sorted({each for each in (*truth, *shown) if each[0] == name}, key=repr):
        if truth.get(series, 0) != shown.get(series, 0):
            yield f"{_said(series)} is {shown.get(series)}, truth {truth.get(series, 0)}"


def missteps(samples: Mapping[Series, Iterable[int]], truth: Mapping[Series, int]) -> Iterator[str]:
    """Yield where a series fell, or was above the ledger's last value, in the order of its samples."""
    for series, values in samples.items():
        highest = 0
        for value in values:
            if value < highest:
                yield f"{_said(series)} fell from {highest} to {value}"
            if value > truth.get(series, 0):
                yield f"{_said(series)} was {value}, truth {truth.get(series, 0)}"
            highest = max(highest, value)


def _said(series: Series) -> str:
    return "{" + ", ".join(f'{label}="{value}"' for label, value in sorted(series[1])) + "}"


def _shown(name: str, job: str, stack: Stack) -> dict[Series, int]:
    """Return what Prometheus has now, by the query of our rules and boards."""
    found = stack.query(f'max without (instance, pod) ({name}{{job="{job}"}})')
    return {_series(name, each["metric"]): _integer(name, each["value"][1]) for each in found}


def _samples(name: str, job: str, stack: Stack, window: str) -> dict[Series, list[int]]:
    """Return every sample of each series in the order of time, whichever replica it came from."""
    merged: dict[Series, list[tuple[float, int]]] = {}
    for each in stack.query(f'{name}{{job="{job}"}}[{window}]'):
        values = [(float(at), _integer(name, value)) for at, value in each["values"]]
        merged.setdefault(_series(name, each["metric"]), []).extend(values)
    return {series: [value for _, value in sorted(values)] for series, values in merged.items()}


def _increase(name: str, job: str, stack: Stack, window: str) -> float:
    found = stack.query(f'sum(increase({name}{{job="{job}"}}[{window}]))')
    return float(found[0]["value"][1]) if found else 0.0


def _series(name: str, metric: dict[str, str]) -> Series:
    return series_of(name, {label: value for label, value in metric.items() if label not in _OF_TARGETS})


def _integer(name: str, value: str) -> int:
    """A float as Prometheus writes it is within half an integer up to 2**52 of them: 52 days in ns."""
    return round(Decimal(value) * SCALES[name])
