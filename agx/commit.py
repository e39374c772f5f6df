"""The group commit of a loop: what its sessions have collected leaves in one round trip."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .connections import Bus
from .facts import APPEND_BUCKETS

if TYPE_CHECKING:
    from .writer import SessionWriter

FLUSH_INTERVAL = 0.004  # seconds between two group commits of a loop; the first one after a pause leaves at once


@dataclass(slots=True)
class AppendStats:
    """Append latencies of a loop since the last `process` fact."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(APPEND_BUCKETS) + 1))
    sum_ns: int = 0

    def observe(self, ns: int) -> None:
        self.counts[bisect_left(APPEND_BUCKETS, ns / 1e9)] += 1
        self.sum_ns += ns

    def reset(self) -> None:
        self.counts = [0] * (len(APPEND_BUCKETS) + 1)
        self.sum_ns = 0


class GroupCommit:
    """The group commit of a loop: what its sessions have collected leaves in one round trip."""

    def __init__(self, bus: Bus, *, max_length: int, max_body: int) -> None:
        self.bus = bus
        self.max_length = max_length
        self.max_body = max_body
        self.stats = AppendStats()
        self.sessions: set[SessionWriter] = set()
        self._dirty: set[SessionWriter] = set()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._timer_is_urgent = False
        self._last_flush = 0.0

    def schedule(self, session: SessionWriter, *, urgent: bool) -> None:
        """Have a session's batch sent: now where the last flush is old enough or it is urgent, else with the next."""
        self._dirty.add(session)
        if self._timer is not None:
            if not urgent or self._timer_is_urgent:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        wait = 0.0 if urgent else self._last_flush + FLUSH_INTERVAL - loop.time()
        self._timer_is_urgent = wait <= 0
        self._timer = loop.call_later(wait, self._flush) if wait > 0 else loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._last_flush = asyncio.get_running_loop().time()
        dirty, self._dirty = self._dirty, set()
        for session in dirty:
            session.send()

    @property
    def buffered_events(self) -> int:
        return sum(session.buffered for session in self.sessions)

    def close(self) -> None:
        """Stop the timer; what has not been sent is lost with the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
