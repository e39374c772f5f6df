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
_LATER = 0.1  # seconds
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
    """Decides when batches are sent: at once if they are urgent or after a pause, else with those of other sessions."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.stats = AppendStats()
        self._supervisor = supervisor
        self._urgent: set[Sender] = set()  # sent without the others, whose deltas would merge less
        self._soon: asyncio.Handle | None = None
        self._waiting: set[Sender] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last_commit = 0.0
        self._interval = _SHORT
        self._later: dict[Sender, float] = {}  # due at this time of the loop, in this order
        self._later_timer: asyncio.TimerHandle | None = None

    def schedule(self, session: Sender, when: When) -> None:
        """Have a session's batch sent, and at once if the last commit is old enough, unless it is for later."""
        if session in self._urgent:
            return
        loop = asyncio.get_running_loop()
        next_commit = self._last_commit + self._interval
        if when == "now" or (when == "soon" and self._timer is None and next_commit <= loop.time()):
            self._waiting.discard(session)
            self._urgent.add(session)
            if self._soon is None:
                self._soon = loop.call_soon(self._commit_urgent)
        elif when == "soon":
            self._waiting.add(session)
            if self._timer is None:
                self._timer = loop.call_at(next_commit, self._commit)
        elif session not in self._waiting and session not in self._later:
            self._later[session] = due = loop.time() + _LATER
            if self._later_timer is None:
                self._later_timer = loop.call_at(due, self._schedule_due)

    def _schedule_due(self) -> None:
        self._later_timer = None
        loop = asyncio.get_running_loop()
        until = loop.time() + _SHORT
        for session, due in list(self._later.items()):
            if due > until:
                self._later_timer = loop.call_at(due, self._schedule_due)
                break
            del self._later[session]
            self.schedule(session, "soon")

    def _commit_urgent(self) -> None:
        self._soon = None
        sessions, self._urgent = self._urgent, set()
        self._send(sessions)

    def _commit(self) -> None:
        self._timer = None
        sessions, self._waiting = self._waiting, set()
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
        for timer in (self._soon, self._timer, self._later_timer):
            if timer is not None:
                timer.cancel()
        self._soon = self._timer = self._later_timer = None
