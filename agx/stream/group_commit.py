"""The group commit of a loop: what its sessions have collected leaves in one round trip."""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..facts.schema import APPEND_BUCKETS
from ..redis.bus import Bus
from ..redis.supervisor import Supervisor

logger = logging.getLogger("agx")

# Seconds between two group commits of a loop; the first one after a pause leaves at once. Waiting longer pays where
# deltas come so fast that they merge, and costs only delay where they don't: thirty pictures a second look smooth.
_SHORT, _LONG = 0.006, 0.033
_MOST_SAID = 300  # characters of an error: Sentinel's say everything about everybody
_SEND_AGAIN = 0.5  # seconds after a session raised while it sent
_URGE_EVERY = 0.1  # seconds
_REFRESH = 3_600.0  # seconds between refreshes of the streams' expiry, which lasts a day


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


class Batched(Protocol):
    """A session whose events leave with the group commit: the writer of one session's stream."""

    @property
    def stream(self) -> str: ...

    @property
    def buffered(self) -> int: ...

    @property
    def last_put(self) -> float: ...

    def send(self) -> int:
        """Send the next batch; returns how many deltas have merged with others in it."""
        ...

    def check(self) -> None:
        """Look whether what was acknowledged lately is still there."""
        ...

    def refresh(self) -> None:
        """Put the stream's expiry off again."""
        ...

    def retry_now(self) -> None:
        """Try again without waiting any longer."""
        ...

    def forget(self) -> None:
        """Drop the retained entries."""
        ...


class GroupCommit:
    """The group commit of a loop: what its sessions have collected leaves in one round trip."""

    def __init__(self, bus: Bus, supervisor: Supervisor, *, max_length: int, max_body: int, keep: float) -> None:
        self.bus = bus
        self._supervisor = supervisor
        self.max_length = max_length
        self.max_body = max_body
        self.keep = keep  # seconds for which what was acknowledged is kept
        self.stats = AppendStats()
        self.sessions: set[Batched] = set()  # open
        self._closed: dict[str, Batched] = {}  # by stream, while what was acknowledged is kept
        self._troubled: set[Batched] = set()
        self._urged = 0.0  # when the troubled were last told that another has got through
        self._watch: asyncio.TimerHandle | None = None
        self._refreshed = time.monotonic()
        self._dirty: set[Batched] = set()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._timer_is_urgent = False
        self._last_flush = 0.0
        self._interval = _SHORT

    def schedule(self, session: Batched, *, urgent: bool) -> None:
        """Have a session's batch sent: now where the last flush is old enough or it is urgent, else with the next."""
        self._dirty.add(session)
        if self._timer is not None:
            if not urgent or self._timer_is_urgent:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        wait = 0.0 if urgent else self._last_flush + self._interval - loop.time()
        self._timer_is_urgent = wait <= 0
        self._timer = loop.call_later(wait, self._flush) if wait > 0 else loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._last_flush = asyncio.get_running_loop().time()
        dirty, self._dirty = self._dirty, set()
        merged = 0
        for session in dirty:
            try:
                merged += session.send()
            except Exception as error:  # one session that can't send must not hold the others up
                self._supervisor.note(error, "agx-group-commit")
                asyncio.get_running_loop().call_later(_SEND_AGAIN, partial(self.schedule, session, urgent=True))
        self._interval = _LONG if merged > len(dirty) / 2 else _SHORT

    # --- sessions, and what they keep ---

    def open(self, session: Batched) -> None:
        """Take a session in, whose `begin` is appended; what the run before it kept is the past."""
        if (before := self._closed.pop(session.stream, None)) is not None:
            before.forget()
        self.sessions.add(session)
        if self._watch is None:
            self._watch_soon()

    def close_session(self, session: Batched, keep: float) -> None:
        """Let a session go, `keep` seconds after now for good."""
        self.sessions.discard(session)
        self._closed[session.stream] = session
        asyncio.get_running_loop().call_later(keep, self._forget, session)

    def _forget(self, session: Batched) -> None:
        session.forget()
        self.note_recovery(session)
        if self._closed.get(session.stream) is session:
            del self._closed[session.stream]

    def _watch_soon(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(self.keep / 3, self._look)

    def _look(self) -> None:
        """Check the sessions that are quiet now: nothing else would notice there that a failover has lost something."""
        self._watch = None
        if self.sessions or self._closed:
            self._watch_soon()
        self.check_all()
        if time.monotonic() - self._refreshed > _REFRESH:
            self._refreshed = time.monotonic()
            for session in self.sessions:
                session.refresh()

    def check_all(self) -> None:
        """Have every session look whether what was acknowledged lately is still there."""
        for session in (*self.sessions, *self._closed.values()):
            self._supervisor.call(session.check, name="agx-group-commit")

    # --- trouble, told once for all sessions ---

    def note_trouble(self, session: Batched, error: BaseException) -> None:
        if not self._troubled:
            logger.warning(
                "agx: Redis refuses or can't be reached (%s: %s); runs go on, their events wait in memory",
                type(error).__name__,
                str(error)[:_MOST_SAID],
            )
        self._troubled.add(session)

    def note_recovery(self, session: Batched) -> None:
        if session not in self._troubled:
            return
        self._troubled.discard(session)
        if not self._troubled:
            logger.warning("agx: Redis is back, all events that waited are appended")
        elif time.monotonic() - self._urged > _URGE_EVERY:
            self._urged = time.monotonic()
            for other in list(self._troubled):
                other.retry_now()

    @property
    def buffered_events(self) -> int:
        return sum(session.buffered for session in self.sessions)

    def close(self) -> None:
        """Stop the timers; what has not been sent is lost with the loop."""
        for timer in (self._timer, self._watch):
            if timer is not None:
                timer.cancel()
        self._timer = self._watch = None
        for session in (*self.sessions, *self._closed.values()):
            session.forget()
