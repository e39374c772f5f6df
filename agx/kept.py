"""What a stream has acknowledged lately, kept in case a failover loses it (contract, section 4, append rule)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
