"""Folds facts into series: each fact counts once; counts and positions move together (contract, sections 6 and 7).

The table of metrics is compiled once into feeders. A feeder looks up, with one key per fact, all cells that the fact
adds to; on the first fact of such a key it finds them in the series and zero-initializes what the fact makes known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from agx.facts.decoding import MalformedFactError, UnknownFactError
from agx.facts.reader import QueueEntry
from agx.facts.schema import (
    Fact,
    NodeEnded,
    ProcessState,
)
from agx.redis.entry_id import parse_id

from ..source import Decode, decode_fact
from . import instruments as i
from . import table as t
from .series import LABEL_LENGTH, Cell, Counter, Histogram, Series
from .table import Counts, Instrument, Label, Source, Value

RECENT = 100_000  # facts among which a repeat is recognised
HEARTBEAT_LIFE_MS = 30_000  # a process that has sent no heartbeat for so long has gone

ZERO_ID = "0-0"


@dataclasses.dataclass(slots=True)
class Position:
    """How far a partition has been read: the last entry's id, how many were read, how many were trimmed unread."""

    last_id: str = ZERO_ID
    count: int = 0
    trimmed: int = 0


class Intake:
    """What a replica counts of the entries that it reads, whatever they are: kinds of facts, malformed, repaired."""

    def __init__(self, own: Series) -> None:
        self.kinds = {kind: own.counter(i.FACTS, kind) for kind in t.FACT_KIND.values}
        self.malformed = own.counter(i.MALFORMED)
        self.repaired = own.counter(i.REPAIRED)


class Deduplicator:
    """The keys of the last facts, at least `size` and at most twice as many."""

    def __init__(self, size: int = RECENT) -> None:
        self._size = size
        self._new: set[str] = set()
        self._old: set[str] = set()

    def add(self, key: str) -> bool:
        """Remember a key; returns whether it was not known."""
        if key in self._new or key in self._old:
            return False
        self._new.add(key)
        if len(self._new) >= self._size:
            self._old, self._new = self._new, set()
        return True


@dataclasses.dataclass(slots=True)
class _Plan:
    """The cells of one key, by what is done to them, each with the function that takes its value from the fact."""

    ones: list[Counter] = dataclasses.field(default_factory=list)
    sums: list[tuple[Counter, Value]] = dataclasses.field(default_factory=list)
    observations: list[tuple[Histogram, Value]] = dataclasses.field(default_factory=list)
    durations: list[tuple[Histogram, Value]] = dataclasses.field(default_factory=list)
    merges: list[tuple[Histogram, Counts, Value]] = dataclasses.field(default_factory=list)
    touched: int = 0

    def add(self, instrument: Instrument, cell: Cell, value: Value | None) -> None:
        if isinstance(cell, Counter):
            if value is None:
                self.ones.append(cell)
            else:
                self.sums.append((cell, value))
            return
        assert value is not None
        if instrument.counts is not None:
            self.merges.append((cell, instrument.counts, value))
        elif instrument.has_exemplars:
            self.durations.append((cell, value))
        else:
            self.observations.append((cell, value))

    def cells(self) -> Iterator[Cell]:
        yield from self.ones
        for pairs in (self.sums, self.observations, self.durations, self.merges):
            yield from (pair[0] for pair in pairs)

    def touch(self) -> None:
        """Pass the time of the last fact on to the cells."""
        for cell in self.cells():
            cell.touched = max(cell.touched, self.touched)


class _Feeder:
    """Feeds the instruments that one kind of fact, or one part of it, is observed by."""

    def __init__(self, series: Series, source: Source, table: Sequence[Instrument]) -> None:
        self.fact = source.fact
        self.part = source.part
        self._series = series
        self._fed = [each for each in table if each.source and _group(each.source) == _group(source)]
        self._known = [each for each in table if each.source and all(_is_known(label, source) for label in each.by)]
        paths = _paths_of(self._fed, self._known)
        # What takes from a fact, in one step, all that decides about labels.
        self._key: Callable[[Any], Any] = attrgetter(*sorted(paths)) if paths else lambda fact: ()
        self._at_ns: Callable[[Any], int] = attrgetter(f"{self.part}.{source.at_ns}" if self.part else source.at_ns)
        self._plans: dict[Any, _Plan] = {}

    def feed(self, fact: Any) -> None:
        """Count a fact."""
        key = self._key(fact)
        plan = self._plans.get(key)
        is_new = plan is None
        if plan is None:
            plan = self._make_plan(key, fact)
        for counter in plan.ones:
            counter.value += 1
        for counter, value in plan.sums:
            if (amount := value(fact)) is not None and amount > 0:
                counter.value += amount
        for histogram, value in plan.observations:
            histogram.observe(value(fact) or 0)
        if plan.durations:
            trace = fact.trace
            # Nobody exported an unsampled trace: no exemplar leads there.
            trace_id = trace.trace_id if trace.sampled and len(trace.trace_id) == 32 else None
            at_ns = self._at_ns(fact)
            for histogram, value in plan.durations:
                if (duration := value(fact)) is not None:
                    histogram.observe(duration, trace_id, at_ns)
        for histogram, counts, value in plan.merges:
            if per_bucket := counts(fact):
                histogram.merge(per_bucket, value(fact) or 0)
        plan.touched = self._series.now
        if is_new:
            plan.touch()

    def touch(self) -> None:
        """Pass the times of the last facts on to the cells."""
        for plan in self._plans.values():
            plan.touch()

    def forget(self) -> None:
        """Series have been retired: find the cells again."""
        self._plans.clear()

    def _make_plan(self, key: Any, fact: Any) -> _Plan:
        for instrument in self._known:
            choices = [label.values or (_derive(label, fact),) for label in instrument.by]
            self._series.zero_initialize(instrument, choices)
        diverted = self._series.diverted
        plan = _Plan()
        for instrument in self._fed:
            if _matches(instrument, fact):
                for labels, value in _observations(instrument, fact):
                    plan.add(instrument, self._series.find(instrument, labels), value)
        # What counts under `__other__`, or has a value of any length, is not cached: there is no end to such keys.
        texts = [part for part in (key if isinstance(key, tuple) else (key,)) if isinstance(part, str)]
        if self._series.diverted == diverted and all(len(text) <= LABEL_LENGTH for text in texts):
            self._plans[key] = plan
        return plan


def _group(source: Source) -> tuple[type, str | None]:
    return source.fact, source.part


def _paths_of(fed: Sequence[Instrument], known: Sequence[Instrument]) -> set[str]:
    """Return the attributes of a fact that decide which series it feeds and which it makes known."""
    paths = {path for each in fed for label in each.by for path in label.paths}
    paths |= {path for each in known for label in each.by if not label.values for path in label.paths}
    return paths | {each.source.where[0] for each in fed if each.source and each.source.where}


def _is_known(label: Label, source: Source) -> bool:
    """Whether facts of a source have all that a label is made from, or its first values are known anyway."""
    if label.values:
        return True
    fields = {field.name: field for field in dataclasses.fields(source.fact)}
    for path in label.paths:
        root, _, rest = path.partition(".")
        if root not in fields:
            return False
        if rest and root != source.part and fields[root].default is not dataclasses.MISSING:  # may be None
            return False
    return bool(label.paths)


def _derive(label: Label, fact: Any) -> str:
    values = [attrgetter(path)(fact) for path in label.paths]
    return str(values[0]) if label.derive is None else label.derive(*values)


def _matches(instrument: Instrument, fact: Any) -> bool:
    where = instrument.source.where if instrument.source else None
    return where is None or attrgetter(where[0])(fact) in where[1]


def _observations(instrument: Instrument, fact: Any) -> Iterator[tuple[tuple[str, ...], Value | None]]:
    """Yield the label sets that a fact is observed under, each with what is observed there."""
    by_part = instrument.value if isinstance(instrument.value, Mapping) else {"": instrument.value}
    for part, value in by_part.items():
        yield tuple(part if label.is_part else _derive(label, fact) for label in instrument.by), value


class Fold:
    """The sum of all facts read so far.

    Args:
        own: this replica's own series.
        read: the ids up to which this replica has read each partition before. A leader that lost its lease before it
            wrote the state reads those entries again when it leads again; its own series have them already.
    """

    def __init__(
        self,
        series: Series,
        own: Series,
        positions: dict[int, Position] | None = None,
        table: Sequence[Instrument] = i.CATALOGUE,
        read: Mapping[int, str] | None = None,
        *,
        decode: Decode = decode_fact,
    ) -> None:
        self.series = series
        self.own = own
        self.positions = positions or {}
        self.known = Deduplicator()
        # Per process: when it was received (server ms), and the fact.
        self.heartbeats: dict[tuple[str, str], tuple[int, ProcessState]] = {}
        self.changes = 0  # goes up with every batch, so that a state is written only if it has changed
        self._decode_fact = decode
        self._intake, self._second_intake = Intake(own), Intake(Series())
        self._read = {n: parse_id(entry_id) for n, entry_id in (read or {}).items()}
        self._feeders: dict[type, list[_Feeder]] = {}
        sources = {_group(each.source): each.source for each in table if each.source}
        for source in sources.values():
            self._feeders.setdefault(source.fact, []).append(_Feeder(series, source, table))

    def apply(self, partition: int, entries: Sequence[QueueEntry]) -> None:
        """Count a batch of queue entries; a malformed, unknown or repeated one moves the position only."""
        position = self.positions[partition]
        self.series.now = parse_id(entries[-1].id)[0] // 1000
        self.changes += 1
        for entry in entries:
            position.last_id = entry.id
            position.count += 1
            intake = self._find_intake(partition, entry.id) if self._read else self._intake
            fact = self._decode(entry.payload, intake)
            if fact is None:
                continue
            for feeder in self._feeders.get(type(fact), ()):
                if feeder.part is None or getattr(fact, feeder.part) is not None:
                    feeder.feed(fact)
            if isinstance(fact, NodeEnded) and fact.failed_attempts:
                self._feed_attempts(fact)
            if isinstance(fact, ProcessState):
                received_ms = parse_id(entry.id)[0]
                self.heartbeats[fact.service.name, fact.service.instance or ""] = (received_ms, fact)

    def _feed_attempts(self, node: NodeEnded) -> None:
        """Count each failed attempt as a model request of its own: that of a node that failed with it."""
        for call in node.failed_attempts:
            attempt = dataclasses.replace(node, model=call, outcome="failed", error_type=call.error_type)
            for feeder in self._feeders[NodeEnded]:
                if feeder.part == "model":
                    feeder.feed(attempt)

    def _find_intake(self, partition: int, entry_id: str) -> Intake:
        if (read := self._read.get(partition)) is None:
            return self._intake
        if parse_id(entry_id) <= read:
            return self._second_intake
        del self._read[partition]
        return self._intake

    def _decode(self, payload: bytes, intake: Intake) -> Fact | None:
        """Return a fact that has not been counted, and count what kind of entry it is."""
        try:
            fact, is_repaired = self._decode_fact(payload)
        except MalformedFactError:
            intake.malformed.add()
            return None
        except UnknownFactError:
            intake.kinds["unknown"].value += 1
            return None
        if is_repaired:
            intake.repaired.add()
        if not self.known.add(fact.key):
            intake.kinds["repeat"].value += 1
            return None
        intake.kinds[fact.kind].value += 1
        return fact

    def touch(self) -> None:
        """Bring the series' times up to date, which feeders only note per key."""
        for feeders in self._feeders.values():
            for feeder in feeders:
                feeder.touch()

    def forget_idle(self, now: int) -> None:
        """Retire idle series and processes that have gone (`now` in s)."""
        self.heartbeats = {
            key: received for key, received in self.heartbeats.items() if now * 1000 - received[0] <= HEARTBEAT_LIFE_MS
        }
        self.touch()
        if self.series.retire(now - t.SERIES_IDLE):
            self.changes += 1
            for feeders in self._feeders.values():
                for feeder in feeders:
                    feeder.forget()
