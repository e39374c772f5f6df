"""The group commit of a loop: the batches of all its sessions leave together, in one round trip."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..facts.schema import APPEND_BUCKETS
from ..redis.supervisor import Supervisor
from .entry import When

# Seconds between two commits of a loop; the first one after a pause is sent at once. A longer interval pays where
# deltas come so fast that they merge, and costs only delay where they don't. At 30 a second a text still looks smooth.
_SHORT, _LONG = 0.006, 0.033
_LATER = 0.1  # seconds that entries for later wait at most
_SEND_AGAIN = 0.5  # seconds after a session raised while it sent


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


class Sender(Protocol):
    """A session that has events to send."""

    def send(self) -> int:
        """Send the next batch; returns how many deltas were merged with others in it."""
        ...


class GroupCommit:
    """Decides when the batch of a session is sent: now, soon or later (see `When`)."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.stats = AppendStats()
        self._supervisor = supervisor
        self._now: set[Sender] = set()  # sent alone: if the others were sent too, fewer of their deltas would merge
        self._now_handle: asyncio.Handle | None = None
        self._soon: set[Sender] = set()
        self._soon_timer: asyncio.TimerHandle | None = None
        self._last_commit = 0.0
        self._interval = _SHORT
        self._later: dict[Sender, float] = {}  # with the time of the loop at which each is due, in order
        self._later_timer: asyncio.TimerHandle | None = None

    def schedule(self, session: Sender, when: When) -> None:
        """Plan when a session's batch is sent. After a pause "soon" means at once."""
        if session in self._now:
            return
        loop = asyncio.get_running_loop()
        next_commit = self._last_commit + self._interval
        if when == "now" or (when == "soon" and self._soon_timer is None and next_commit <= loop.time()):
            self._soon.discard(session)
            self._now.add(session)
            if self._now_handle is None:
                self._now_handle = loop.call_soon(self._commit_now)
        elif when == "soon":
            self._soon.add(session)
            if self._soon_timer is None:
                self._soon_timer = loop.call_at(next_commit, self._commit_soon)
        elif session not in self._soon and session not in self._later:
            self._later[session] = due = loop.time() + _LATER
            if self._later_timer is None:
                self._later_timer = loop.call_at(due, self._move_due)

    def _move_due(self) -> None:
        """Give the next commit the sessions whose time has come."""
        self._later_timer = None
        loop = asyncio.get_running_loop()
        until = loop.time() + _SHORT
        for session, due in list(self._later.items()):
            if due > until:
                self._later_timer = loop.call_at(due, self._move_due)
                break
            del self._later[session]
            self.schedule(session, "soon")

    def _commit_now(self) -> None:
        self._now_handle = None
        sessions, self._now = self._now, set()
        self._send(sessions)

    def _commit_soon(self) -> None:
        self._soon_timer = None
        sessions, self._soon = self._soon, set()
        self._interval = _LONG if self._send(sessions) > len(sessions) / 2 else _SHORT

    def _send(self, sessions: set[Sender]) -> int:
        """Have sessions send; returns how many deltas were merged with others."""
        loop = asyncio.get_running_loop()
        self._last_commit = loop.time()
        merged = 0
        for session in sessions:
            try:
                merged += session.send()
            except Exception as error:  # one session that can't send must not hold the others up
                self._supervisor.note(error, "agx-group-commit")
                loop.call_later(_SEND_AGAIN, partial(self.schedule, session, "now"))
        return merged

    def close(self) -> None:
        """Stop the timers; what was not sent is lost with the loop."""
        for timer in (self._now_handle, self._soon_timer, self._later_timer):
            if timer is not None:
                timer.cancel()
        self._now_handle = self._soon_timer = self._later_timer = None
