"""The group commit of a loop: the batches of all its sessions leave together, in one round trip."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..facts.schema import APPEND_BUCKETS
from ..redis.supervisor import Supervisor

# Seconds between two commits of a loop; the first one after a pause is sent at once. A longer interval pays where
# deltas come so fast that they merge, and costs only delay where they don't. At 30 a second a text still looks smooth.
_SHORT, _LONG = 0.006, 0.033
UNFOLLOWED = 0.1  # seconds that deltas wait where nobody follows the session: more of them merge
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
    """Decides when batches are sent: at once after a pause, else with those of all other sessions."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.stats = AppendStats()
        self._supervisor = supervisor
        self._waiting: set[Sender] = set()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._timer_is_urgent = False
        self._last_commit = 0.0
        self._interval = _SHORT
        self._unfollowed: dict[Sender, float] = {}  # due at this time of the loop, in this order
        self._unfollowed_timer: asyncio.TimerHandle | None = None

    def schedule(self, session: Sender, *, urgent: bool, is_followed: bool = True) -> None:
        """Have a session's batch sent: at once if it is urgent or the last commit is old enough, else with the next.

        A batch that is not urgent can wait longer where nobody follows the session.
        """
        if not is_followed and not urgent:
            self._schedule_later(session)
            return
        self._waiting.add(session)
        if self._timer is not None:
            if not urgent or self._timer_is_urgent:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        wait = 0.0 if urgent else self._last_commit + self._interval - loop.time()
        self._timer_is_urgent = wait <= 0
        self._timer = loop.call_later(wait, self._commit) if wait > 0 else loop.call_soon(self._commit)

    def _schedule_later(self, session: Sender) -> None:
        if session in self._unfollowed or session in self._waiting:
            return
        loop = asyncio.get_running_loop()
        self._unfollowed[session] = loop.time() + UNFOLLOWED
        if self._unfollowed_timer is None:
            self._unfollowed_timer = loop.call_later(UNFOLLOWED, self._schedule_due)

    def _schedule_due(self) -> None:
        self._unfollowed_timer = None
        loop = asyncio.get_running_loop()
        until = loop.time() + _SHORT
        for session, due in list(self._unfollowed.items()):
            if due > until:
                self._unfollowed_timer = loop.call_at(due, self._schedule_due)
                break
            del self._unfollowed[session]
            self.schedule(session, urgent=False)

    def _commit(self) -> None:
        self._timer = None
        self._last_commit = asyncio.get_running_loop().time()
        sessions, self._waiting = self._waiting, set()
        merged = 0
        for session in sessions:
            try:
                merged += session.send()
            except Exception as error:  # one session that can't send must not hold the others up
                self._supervisor.note(error, "agx-group-commit")
                asyncio.get_running_loop().call_later(_SEND_AGAIN, partial(self.schedule, session, urgent=True))
        self._interval = _LONG if merged > len(sessions) / 2 else _SHORT

    def close(self) -> None:
        """Stop the timer; what was not sent is lost with the loop."""
        for timer in (self._timer, self._unfollowed_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._unfollowed_timer = None
