"""Writes the fold as the metric state and reads it back: header, then compressed JSON (contract, section 7).

The header is plain text of fixed length, so that scripts and older versions can read it whatever the body is.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import orjson

from .fold import Position, TracesTrims
from .instruments import BY_NAME
from .series import Counter, Histogram, Series

FORMAT = 1  # goes up when an older sidecar could misread a newer state
OWNER_LENGTH = 32
RELEASED = "-" * OWNER_LENGTH  # the owner of a state whose leader left in good order

_MAGIC = b"agx-state"
_SAFE_INTEGER = 2**53


class UnreadableStateError(ValueError):
    """A state that this version should be able to read, and cannot."""


class NewerStateError(ValueError):
    """A state written by a newer version: do not lead."""


@dataclass(frozen=True, slots=True)
class Header:
    """Who owns the state. The epoch rises with each claim, so an older owner is always told apart."""

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


def dump(series: Series, positions: dict[int, Position]) -> bytes:
    """Return the fold as JSON, all of one moment; `pack` compresses it."""
    return orjson.dumps(
        {
            "positions": {str(n): _dump_position(at) for n, at in positions.items()},
            "series": {
                instrument.name: [_dump_cell(labels, cell) for labels, cell in cells.items()]
                for instrument, cells in series.cells.items()
            },
        }
    )


def pack(dumped: bytes) -> bytes:
    """Return the body of a state; takes milliseconds, so call it in a thread."""
    return zlib.compress(dumped, 6)


def load(body: bytes) -> tuple[Series, dict[int, Position]]:
    """Read the body of a state.

    Raises:
        UnreadableStateError: it is damaged.
    """
    try:
        raw = orjson.loads(zlib.decompress(body))
        positions = {int(n): _load_position(*at) for n, at in raw["positions"].items()}
        series = Series()
        for name, cells in raw["series"].items():
            _load_cells(series, name, cells)
    except (zlib.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnreadableStateError(f"{type(error).__name__}: {error}") from None
    return series, positions


def _dump_position(at: Position) -> list[Any]:
    return [at.last_id, at.count, at.trimmed, at.traces.total, at.traces.at_sync, at.traces.gap]


def _load_position(last_id: str, *counts: int) -> Position:
    count, trimmed, total, at_sync, gap = map(int, counts)
    return Position(str(last_id), count, trimmed, TracesTrims(total, at_sync, gap))


def _dump_cell(labels: tuple[str, ...], cell: Counter | Histogram) -> list[Any]:
    if isinstance(cell, Counter):
        return [labels, cell.touched, _number(cell.value)]
    return [labels, cell.touched, _number(cell.sum), cell.counts]


def _number(value: int) -> int | str:
    """JSON as we write it stops at 64 bits; a fleet's nanoseconds do not."""
    return value if value < _SAFE_INTEGER else str(value)


def _load_cells(series: Series, name: str, cells: list[Any]) -> None:
    instrument = BY_NAME.get(name)
    if instrument is None:  # a metric that no longer exists
        return
    for labels, touched, value, *rest in cells:
        if len(labels) != len(instrument.labels):
            raise ValueError(f"{name} has other labels")
        cell = series.put(instrument, tuple(map(str, labels)), int(touched))
        if isinstance(cell, Counter):
            cell.value = int(value)
            continue
        counts = [int(count) for count in rest[0]]
        if len(counts) != len(cell.counts):
            raise ValueError(f"{name} has other buckets")
        cell.sum, cell.counts = int(value), counts
