"""What a stream has acknowledged lately, kept in case a failover loses it (contract, section 4, append rule)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..redis.bus import Reply
from ..redis.entry_id import StreamId, parse_id

MOST_ENTRIES = 4_096
MOST_BYTES = 4_194_304


@dataclass(slots=True)
class Sent:
    """An entry as it was first sent; its body and `seq` never change afterwards."""

    id: str
    type: str
    origin: str
    body: bytes
    seq: int


class Kept:
    """The entries of the last `seconds`, within bounds; and `begin`, without which a stream is nobody's."""

    def __init__(self, seconds: float) -> None:
        self.begin: Sent | None = None
        self._seconds = seconds
        self._entries: deque[tuple[float, Sent]] = deque()
        self._bytes = 0

    def add(self, entries: Iterable[Sent]) -> None:
        """Keep what was acknowledged just now, and let go of what is old."""
        now = time.monotonic()
        for entry in entries:
            self._entries.append((now, entry))
            self._bytes += len(entry.body)
        self._expire(now)

    def _expire(self, now: float) -> None:
        entries, oldest = self._entries, now - self._seconds
        while entries and (
            entries[0][0] < oldest or len(entries) > MOST_ENTRIES or (self._bytes > MOST_BYTES and len(entries) > 1)
        ):
            self._bytes -= len(entries.popleft()[1].body)

    def __iter__(self) -> Iterator[Sent]:
        self._expire(time.monotonic())
        return (entry for _, entry in self._entries)

    def __bool__(self) -> bool:
        self._expire(time.monotonic())
        return bool(self._entries)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a stream, by id."""

    entries: dict[str, dict[bytes, bytes]]

    @classmethod
    def of(cls, reply: Reply) -> Found:
        return cls({entry_id.decode(): fields for entry_id, fields in reply})

    def __contains__(self, entry: Sent) -> bool:
        return self.entries.get(entry.id, {}).get(b"body") == entry.body

    @property
    def top(self) -> StreamId:
        return max(map(parse_id, self.entries), default=(0, 0))

    def is_anothers(self, ours: Iterable[Sent | None], *, known: str) -> bool:
        """Whether somebody else began or ended a run here; the entry `known` is ours, though no longer kept."""
        bodies = {entry.id: entry.body for entry in ours if entry is not None}
        return any(
            fields.get(b"type") in (b"begin", b"end") and bodies.get(entry_id) != fields.get(b"body")
            for entry_id, fields in self.entries.items()
            if entry_id != known
        )
