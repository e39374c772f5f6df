"""Writes what was counted as the metric state and reads it back: a header, then compressed JSON (contract, section 7).

The header is plain text of fixed length, so that scripts and older versions can read it whatever the body is.
The body is read metric by metric, so an upgrade changes no other metric than those whose row changed:

- a metric that this version does not have is retained as it is, for a version that does;
- an added label is "" in the old series, and the series of a removed label are summed;
- a metric whose buckets changed restarts.

Version 0.2.0 reads `positions` and `series`, ignores what it does not know, and refuses the whole state if a metric has
another number of labels or buckets than its own. So `series` has each metric in 0.2.0's shape, and `changed` has those
whose shape has changed since as they are. `shapes` has the labels and buckets of both.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from .fold import Position
from .gauges import TracesTrims
from .instruments import CATALOGUE
from .series import Counter, Histogram, Labels, Series
from .state_0_2 import SHAPES
from .table import SERIES_IDLE, Instrument

logger = logging.getLogger(__name__)

FORMAT = 1  # goes up when an older sidecar could misread a newer state
OWNER_LENGTH = 32
RELEASED = "-" * OWNER_LENGTH  # the owner of a state whose leader left in good order

_MAGIC = b"agx-state"
_SAFE_INTEGER = 2**53
_LARGEST = 32 * 2**20  # bytes of JSON; a full one has 5 MB


class UnreadableStateError(ValueError):
    """A state that is damaged."""


class NewerStateError(ValueError):
    """A state in a format that this version does not know: this replica must not lead."""


@dataclass(frozen=True, slots=True)
class Header:
    """Who owns the state. The epoch rises with each claim, so the newest owner is known by it."""

    epoch: int
    owner: str
    format: int = FORMAT

    def encode(self) -> bytes:
        return b"%s %04d %016d %s\n" % (_MAGIC, self.format, self.epoch, self.owner.encode())


HEADER_LENGTH = len(Header(0, RELEASED).encode())


def parse_header(data: bytes) -> Header:
    """Return the header of a state; raises UnreadableStateError where there is none."""
    parts = data[:HEADER_LENGTH].split()
    if len(parts) != 4 or parts[0] != _MAGIC or not (parts[1] + parts[2]).isdigit():
        raise UnreadableStateError("it has no header")
    return Header(int(parts[2]), parts[3].decode(errors="replace"), int(parts[1]))


Row = tuple[Labels, int, int, list[int]]  # labels, last touched (s), value or sum, counts (none of a counter)


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides whether a metric's cells can be read: its labels' names and its buckets' bounds."""

    labels: tuple[str, ...]
    buckets: tuple[int, ...] = ()


_SHAPES_0_2 = {name: Shape(tuple(labels.split()), buckets) for name, (labels, buckets) in SHAPES.items()}


@dataclass(slots=True)
class State:
    """What a leader leaves to its successor.

    `foreign` has the rows of metrics that this version does not have. The trims of the traces sink are here because
    the leader counts them: a counter must not depend on the replica that exports it. `begun_ms` is the server time
    since which a push states its counts; 0 in a state of 0.2.0.
    """

    series: Series = field(default_factory=Series)
    positions: dict[int, Position] = field(default_factory=dict)
    traces_trims: dict[int, TracesTrims] = field(default_factory=dict)
    foreign: dict[str, tuple[Shape, list[Row]]] = field(default_factory=dict)
    begun_ms: int = 0


def dump(state: State) -> bytes:
    """Return the state as JSON, all of one moment; `pack` compresses it."""
    series: dict[str, list[Any]] = {}
    changed: dict[str, list[Any]] = {}
    shapes: dict[str, list[Any]] = {}
    for name, (shape, rows) in _shaped_rows(state):
        shapes[name] = [shape.labels, shape.buckets]
        old = _SHAPES_0_2.get(name, shape)
        if old != shape:
            changed[name] = [_dump_row(row) for row in rows]
        if old.buckets == shape.buckets:
            series[name] = [_dump_row(row) for row in _project(rows, shape.labels, old.labels)]
    positions = {
        str(n): _dump_position(at, state.traces_trims.get(n, TracesTrims())) for n, at in state.positions.items()
    }
    return orjson.dumps(
        {"positions": positions, "series": series, "changed": changed, "shapes": shapes, "begun_ms": state.begun_ms}
    )


def pack(dumped: bytes) -> bytes:
    """Return the body of a state; takes milliseconds, so call it in a thread."""
    return zlib.compress(dumped, 1)  # a fifth more than at level 6, in a quarter of the time


def load(body: bytes, table: Sequence[Instrument] = CATALOGUE) -> State:
    """Read the body of a state.

    Raises:
        UnreadableStateError: it is damaged, or larger than any state can be.
    """
    try:
        raw = orjson.loads(_decompress(body))
        positions = {int(n): _load_position(*at) for n, at in raw["positions"].items()}
        begun_ms = int(raw.get("begun_ms", 0))
        cells = {**raw["series"], **raw.get("changed", {})}
        shapes = _SHAPES_0_2 | {
            name: Shape(tuple(labels), tuple(buckets)) for name, (labels, buckets) in raw.get("shapes", {}).items()
        }
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableStateError(f"{type(error).__name__}: {error}") from None
    state = State(positions={n: at for n, (at, _) in positions.items()}, begun_ms=begun_ms)
    state.traces_trims = {n: trims for n, (_, trims) in positions.items()}
    rows = {name: _load_rows(name, shapes[name], of_metric) for name, of_metric in cells.items() if name in shapes}
    newest = max((row[1] for of_metric in rows.values() for row in of_metric), default=0)
    known = {instrument.name: instrument for instrument in table}
    for name, of_metric in rows.items():
        instrument = known.get(name)
        if instrument is not None:
            _add_rows(state.series, instrument, shapes[name], of_metric)
        else:  # retained for the version that has it, as long as that version leads at least once a day
            current = [row for row in of_metric if row[1] >= newest - SERIES_IDLE]
            state.foreign[name] = shapes[name], current
    return state


def _decompress(body: bytes) -> bytes:
    stream = zlib.decompressobj()
    data = stream.decompress(body, _LARGEST)
    if stream.unconsumed_tail:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    if not stream.eof:
        raise ValueError("it is cut off")
    return data


def _shaped_rows(state: State) -> Iterator[tuple[str, tuple[Shape, list[Row]]]]:
    for instrument, cells in state.series.cells.items():
        yield instrument.name, (_shape_of(instrument), [_row(labels, cell) for labels, cell in cells.items()])
    yield from state.foreign.items()


def _shape_of(instrument: Instrument) -> Shape:
    return Shape(instrument.labels, instrument.buckets)


def _row(labels: Labels, cell: Counter | Histogram) -> Row:
    if isinstance(cell, Counter):
        return labels, cell.touched, cell.value, []
    return labels, cell.touched, cell.sum, cell.counts


def _add_rows(series: Series, instrument: Instrument, shape: Shape, rows: list[Row]) -> None:
    if shape.buckets != instrument.buckets:
        logger.warning("%s restarts: its buckets have changed", instrument.name)
        return
    for labels, touched, value, counts in _project(rows, shape.labels, instrument.labels):
        cell = series.put(instrument, labels)
        cell.touched = touched
        if isinstance(cell, Counter):
            cell.value = value
        else:
            cell.sum, cell.counts = value, counts


def _project(rows: Sequence[Row], labels: tuple[str, ...], onto: tuple[str, ...]) -> list[Row]:
    """Return the rows under other labels: one that is missing is "", and what differed in one that has gone is summed.

    So a metric's total stays what it was. Where a label is added and an older version leads for a while, the series
    without the label take over what those with it had: for `increase()` of this one metric that counts twice.
    """
    if labels == onto:
        return list(rows)
    merged: dict[Labels, Row] = {}
    for row in rows:
        by_name = dict(zip(labels, row[0], strict=True))
        key = tuple(by_name.get(label, "") for label in onto)
        merged[key] = _add_up(merged.get(key), (key, *row[1:]))
    return list(merged.values())


def _add_up(row: Row | None, other: Row) -> Row:
    if row is None:
        return other
    counts = [a + b for a, b in zip(row[3], other[3], strict=True)]
    return row[0], max(row[1], other[1]), row[2] + other[2], counts


def _load_rows(name: str, shape: Shape, cells: Any) -> list[Row]:
    """Read one metric's rows; none of them if one is damaged."""
    try:
        return [_load_row(shape, *cell) for cell in cells]
    except (ValueError, TypeError) as error:
        logger.error("%s restarts: its state can't be read (%s)", name, error)
        return []


def _load_row(shape: Shape, labels: Any, touched: Any, value: Any, counts: Any = ()) -> Row:
    if len(labels) != len(shape.labels):
        raise ValueError("other labels than its row states")
    if len(counts) != (len(shape.buckets) + 1 if shape.buckets else 0):
        raise ValueError("other buckets than its row states")
    return tuple(map(str, labels)), int(touched), int(value), [int(count) for count in counts]


def _dump_row(row: Row) -> list[Any]:
    labels, touched, value, counts = row
    if not counts:
        return [labels, touched, _number(value)]
    return [labels, touched, _number(value), counts if max(counts) < _SAFE_INTEGER else [*map(_number, counts)]]


def _number(value: int) -> int | str:
    """JSON as orjson writes it stops at 64 bits; a fleet's nanoseconds do not."""
    return value if value < _SAFE_INTEGER else str(value)


def _dump_position(at: Position, trims: TracesTrims) -> list[Any]:
    return [at.last_id, at.count, at.trimmed, trims.total, trims.at_sync, trims.gap]


def _load_position(last_id: str, *counts: int) -> tuple[Position, TracesTrims]:
    count, trimmed, total, at_sync, gap = map(int, counts)
    return Position(str(last_id), count, trimmed), TracesTrims(total, at_sync, gap)
