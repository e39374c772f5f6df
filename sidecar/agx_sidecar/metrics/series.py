"""Holds series: integer cells per label set, within the caps and budgets of the contract's section 6."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

from .table import OTHER, Instrument, Label

Labels = tuple[str, ...]
Exemplar = tuple[str, int, int]  # trace id, value in the metric's integer unit, time in ns

MAX_OBSERVED = 2**63  # a larger value is a mistake; facts have 64-bit integers, and their differences one bit more
LABEL_LENGTH = 200  # characters of a label's value


class Counter:
    """A sum that only grows (a gauge is one that is set)."""

    __slots__ = ("touched", "value")

    def __init__(self, now: int) -> None:
        self.value = 0
        self.touched = now  # when something was last counted, in s

    def add(self, amount: int = 1) -> None:
        """Add an amount; a negative one counts as 0."""
        if amount > 0:
            self.value += amount


class Histogram:
    """Counts per bucket (not cumulated), the last one above all bounds, and the sum of what was observed."""

    __slots__ = ("bounds", "counts", "exemplars", "sum", "touched")

    def __init__(self, bounds: tuple[int, ...], now: int) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0
        self.touched = now  # when something was last observed, in s
        self.exemplars: list[Exemplar | None] | None = None

    def observe(self, value: int, trace_id: str | None = None, at_ns: int = 0) -> None:
        """Count a value; a negative one counts as 0, because a clock was set back between begin and end."""
        if not 0 <= value < MAX_OBSERVED:
            value = 0 if value < 0 else MAX_OBSERVED
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if trace_id is not None:
            if self.exemplars is None:
                self.exemplars = [None] * len(self.counts)
            self.exemplars[bucket] = (trace_id, value, at_ns)

    def merge(self, counts: Sequence[int], total: int) -> None:
        """Add what a process counted with the same bounds.

        Counts of another length have other bounds, and counts beyond 64 bits are a mistake: they are left out.
        """
        if len(counts) != len(self.counts) or max(counts) >= MAX_OBSERVED or not 0 <= total < MAX_OBSERVED:
            return
        for bucket, count in enumerate(counts):
            if count > 0:
                self.counts[bucket] += count
        self.sum += total


Cell = Counter | Histogram


@dataclass(frozen=True, slots=True)
class Sample:
    """A cell at one moment, safe to render in another thread. `counts` is empty unless it is a histogram."""

    labels: Labels
    value: int
    counts: tuple[int, ...] = ()
    exemplars: tuple[Exemplar | None, ...] | None = None


class Series:
    """All cells of some instruments. `now` (s) is the time of new cells: the caller that counts keeps it current."""

    def __init__(self, now: int = 0) -> None:
        self.cells: dict[Instrument, dict[Labels, Cell]] = {}
        self.now = now
        self.diverted = 0  # label sets, so far, that count under `__other__`
        self._overflows: dict[str, int] = {}  # per label, since they were taken
        self._values: dict[str, set[str]] = {}  # per open label, those that have a series

    def find(self, instrument: Instrument, labels: Labels) -> Cell:
        """Return the cell of a label set; past a cap or the budget, the one with `__other__` in its place."""
        cells = self.cells.setdefault(instrument, {})
        cell = cells.get(labels)
        if cell is not None:
            return cell
        labels = _cut(labels)
        admitted = self._within_caps(instrument, labels)
        if admitted not in cells and len(cells) >= instrument.budget - instrument.budget // 10:
            admitted = self._within_budget(instrument, admitted)
        cell = cells.get(admitted)
        if cell is None:
            cell = self.put(instrument, admitted)
        self.diverted += admitted != labels
        for label, wanted, got in zip(instrument.labels, labels, admitted, strict=True):
            if wanted != got:
                self._overflows[label] = self._overflows.get(label, 0) + 1
        return cell

    def counter(self, instrument: Instrument, *labels: str) -> Counter:
        """Return the cell of a counter's label set, or the one that counts for it."""
        return cast("Counter", self.find(instrument, labels))

    def histogram(self, instrument: Instrument, *labels: str) -> Histogram:
        """Return the cell of a histogram's label set, or the one that counts for it."""
        return cast("Histogram", self.find(instrument, labels))

    def zero_initialize(self, instrument: Instrument, choices: Sequence[Sequence[str]] = ()) -> None:
        """Make the series of all combinations of values at zero (`choices` has those of each label).

        That takes no more than half of the instrument's capacity: the rest is for what is really observed.
        """
        cells = self.cells.setdefault(instrument, {})
        choices = [_cut(values) for values in choices]
        first = tuple(values[0] for values in choices)
        if first in cells or self._within_caps(instrument, first) != first:
            return
        for labels in product(*choices):
            if labels not in cells and len(cells) < instrument.budget // 2:
                self.put(instrument, labels)

    def put(self, instrument: Instrument, labels: Labels) -> Cell:
        """Make the cell of a label set, also beyond the caps."""
        cell: Cell = Histogram(instrument.buckets, self.now) if instrument.kind == "histogram" else Counter(self.now)
        self.cells.setdefault(instrument, {})[labels] = cell
        for label, value in _open_labels(instrument, labels):
            if value != OTHER:
                self._values.setdefault(label, set()).add(value)
        return cell

    def values(self, label: Label) -> frozenset[str]:
        """Return the values of an open label that have a series."""
        return frozenset(self._values.get(label.name, ()))

    def capped(self, label: Label, value: str) -> str:
        """Return a value, cut, or `__other__` where its label has no capacity for it."""
        values = self._values.get(label.name, ())
        value = value[:LABEL_LENGTH]
        return value if value in values or len(values) < label.cap else OTHER

    def _within_caps(self, instrument: Instrument, labels: Labels) -> Labels:
        return tuple(
            value if label.closed else self.capped(label, value)
            for label, value in zip(instrument.by, labels, strict=True)
        )

    def _within_budget(self, instrument: Instrument, labels: Labels) -> Labels:
        """Replace the widest labels one by one, until the label set exists or the reserve has capacity for it."""
        cells = self.cells[instrument]
        widths = [len({known[position] for known in cells}) for position in range(len(labels))]
        for position in sorted(range(len(labels)), key=lambda at: -widths[at]):
            labels = (*labels[:position], OTHER, *labels[position + 1 :])
            if labels in cells or len(cells) < instrument.budget - 1:
                return labels
        return labels

    def take_overflows(self) -> dict[str, int]:
        """Return, once, how often each label's value was replaced by `__other__`."""
        taken, self._overflows = self._overflows, {}
        return taken

    def retire(self, before: int) -> bool:
        """Drop series that are idle since `before` (s) and one of whose open labels is idle everywhere.

        So the zero of an outcome that an active agent has not had stays. Returns whether anything went.
        """
        active: dict[tuple[str, str], int] = {}
        for instrument, cells in self.cells.items():
            for labels, cell in cells.items():
                for key in _open_labels(instrument, labels):
                    active[key] = max(active.get(key, 0), cell.touched)
        gone = False
        for instrument, cells in self.cells.items():
            for labels, cell in list(cells.items()):
                if cell.touched < before and any(active[key] < before for key in _open_labels(instrument, labels)):
                    del cells[labels]
                    gone = True
        if gone:
            self._values.clear()
            for instrument, cells in self.cells.items():
                for labels in cells:
                    for label, value in _open_labels(instrument, labels):
                        if value != OTHER:
                            self._values.setdefault(label, set()).add(value)
        return gone

    def sample(self) -> dict[Instrument, list[Sample]]:
        """Copy every cell, all at one moment."""
        return {
            instrument: [_sample(labels, cell) for labels, cell in cells.items()]
            for instrument, cells in self.cells.items()
        }


def _cut(labels: Sequence[str]) -> Labels:
    return tuple(value[:LABEL_LENGTH] for value in labels)


def _open_labels(instrument: Instrument, labels: Labels) -> list[tuple[str, str]]:
    return [(label.name, value) for label, value in zip(instrument.by, labels, strict=True) if not label.closed]


def _sample(labels: Labels, cell: Cell) -> Sample:
    if isinstance(cell, Counter):
        return Sample(labels, cell.value)
    return Sample(labels, cell.sum, tuple(cell.counts), tuple(cell.exemplars) if cell.exemplars else None)
