"""Runs that are not finalized yet, and when each is looked at again: it failed, or the run can be resumed."""

from __future__ import annotations

import time

_FIRST, _LAST = 5.0, 300.0  # seconds; the wait doubles from the first to the last
_MOST = 10_000  # members; above it the oldest one is dropped, and so tried again at once


class Postponed:
    """Members of the leases that wait for another attempt."""

    def __init__(self) -> None:
        self._waits: dict[bytes, tuple[float, float]] = {}  # by member: when it is due (monotonic), the wait until then

    def add(self, member: bytes) -> float:
        """Postpone a member; returns for how many seconds."""
        _, before = self._waits.pop(member, (0.0, 0.0))
        wait = min(max(_FIRST, before * 2), _LAST)
        self._waits[member] = (time.monotonic() + wait, wait)
        self._drop_oldest()
        return wait

    def hold(self, member: bytes, seconds: float) -> None:
        """Leave a member alone for some seconds: another process may resume its run."""
        self._waits[member] = (time.monotonic() + seconds, 0.0)
        self._drop_oldest()

    def discard(self, member: bytes) -> None:
        """Forget a member, if it is there: its run is finalized."""
        self._waits.pop(member, None)

    def is_due(self, member: bytes) -> bool:
        """Return whether a member may be tried now."""
        due, _ = self._waits.get(member, (0.0, 0.0))
        return due <= time.monotonic()

    def _drop_oldest(self) -> None:
        if len(self._waits) > _MOST:
            del self._waits[next(iter(self._waits))]
