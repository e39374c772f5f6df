"""What a stream has acknowledged lately, kept in case a failover loses it (contract, section 4, append rule)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..redis.entry_id import StreamId
from ..redis.redis_py import Reply
from .entry import StreamEntry

MOST_ENTRIES = 4_096
MOST_BYTES = 4_194_304


class Kept:
    """The entries of the last `seconds`, within bounds; and `begin`, without which a stream is nobody's."""

    def __init__(self, seconds: float) -> None:
        self.begin: StreamEntry | None = None
        self._seconds = seconds
        self._entries: deque[tuple[float, StreamEntry]] = deque()
        self._bytes = 0

    def add(self, entries: Iterable[StreamEntry]) -> None:
        """Keep what was acknowledged just now, and let go of what is old."""
        now = time.monotonic()
        for entry in entries:
            self._entries.append((now, entry))
            self._bytes += len(entry.raw_body)
        self._expire(now)

    def _expire(self, now: float) -> None:
        entries, oldest = self._entries, now - self._seconds
        while entries and (
            entries[0][0] < oldest or len(entries) > MOST_ENTRIES or (self._bytes > MOST_BYTES and len(entries) > 1)
        ):
            self._bytes -= len(entries.popleft()[1].raw_body)

    def clear(self) -> None:
        """Let go of all entries."""
        self._entries.clear()
        self._bytes = 0

    def __iter__(self) -> Iterator[StreamEntry]:
        self._expire(time.monotonic())
        return (entry for _, entry in self._entries)

    def __bool__(self) -> bool:
        self._expire(time.monotonic())
        return bool(self._entries)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a stream, by id."""

    entries: dict[StreamId, StreamEntry]

    @classmethod
    def of(cls, reply: Reply) -> Found:
        return cls({entry.id: entry for entry in (StreamEntry.of(*raw) for raw in reply)})

    def __contains__(self, entry: StreamEntry) -> bool:
        found = self.entries.get(entry.id)
        return found is not None and found.raw_body == entry.raw_body

    @property
    def top(self) -> StreamId:
        return max(self.entries, default=(0, 0))

    def is_of_another_run(self, ours: Iterable[StreamEntry | None], *, known: StreamId) -> bool:
        """Whether somebody else began or ended a run here; the entry `known` is ours, though no longer retained."""
        bodies = {entry.id: entry.raw_body for entry in ours if entry is not None}
        return any(
            entry.type in ("begin", "end") and bodies.get(entry.id) != entry.raw_body
            for entry in self.entries.values()
            if entry.id != known
        )
