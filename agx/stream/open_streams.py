"""The streams that this process writes, or wrote lately: compared with Redis, and their expiry is renewed."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from ..redis.supervisor import Supervisor

logger = logging.getLogger("agx")

_REFRESH = 3_600.0  # seconds between refreshes of the streams' expiry, which lasts a day
_MAX_ERROR = 300  # characters of an error that are logged: Sentinel's name every server
_RETRY_ALL_EVERY = 0.1  # seconds


class WrittenStream(Protocol):
    """A stream with its writer."""

    @property
    def stream(self) -> str: ...

    @property
    def buffered(self) -> int: ...

    @property
    def last_put(self) -> float: ...

    def check(self) -> None:
        """Compare the stream with the retained entries, in the background."""
        ...

    def refresh(self) -> None:
        """Set the stream's expiry anew."""
        ...

    def retry_now(self) -> None:
        """Retry without further delay, where a retry waits."""
        ...

    def forget(self) -> None:
        """Drop the retained entries; nothing is written any more."""
        ...


class OpenStreams:
    """The writers of a loop, and those that were closed less than `retain` seconds ago."""

    def __init__(self, supervisor: Supervisor, *, retain: float) -> None:
        self.writers: set[WrittenStream] = set()
        self._supervisor = supervisor
        self._retain = retain
        self._closed: dict[str, WrittenStream] = {}  # by stream
        self._timer: asyncio.TimerHandle | None = None
        self._refreshed = time.monotonic()
        self._failing: set[WrittenStream] = set()  # Redis did not take their last batch
        self._retried_all = 0.0

    def open(self, writer: WrittenStream) -> None:
        """Add a writer whose `begin` is appended; the entries of the run before are not checked any more."""
        if (before := self._closed.pop(writer.stream, None)) is not None:
            before.forget()
        self.writers.add(writer)
        if self._timer is None:
            self._schedule_check()

    def close(self, writer: WrittenStream, *, retain: bool) -> None:
        """Remove a writer; with `retain` its stream is checked for a while longer."""
        self.writers.discard(writer)
        if retain:
            self._closed[writer.stream] = writer
        asyncio.get_running_loop().call_later(self._retain if retain else 0.0, self._forget, writer)

    def _forget(self, writer: WrittenStream) -> None:
        writer.forget()
        self.note_success(writer)
        if self._closed.get(writer.stream) is writer:
            del self._closed[writer.stream]

    def _schedule_check(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._retain / 3, self._check)

    def _check(self) -> None:
        # Where nothing is appended nothing else would show that a failover has lost entries.
        self._timer = None
        if self.writers or self._closed:
            self._schedule_check()
        self.check_all()
        if time.monotonic() - self._refreshed > _REFRESH:
            self._refreshed = time.monotonic()
            for writer in self.writers:
                writer.refresh()

    def check_all(self) -> None:
        """Compare all streams with their retained entries, in the background."""
        for writer in (*self.writers, *self._closed.values()):
            self._supervisor.call(writer.check, name="agx-check-streams")

    # --- an outage is logged once for all streams, and its end, too

    def note_failure(self, writer: WrittenStream, error: BaseException) -> None:
        """Redis did not take a batch, which will be sent again."""
        if not self._failing:
            logger.warning(
                "agx: Redis refuses or can't be reached (%s: %s); runs go on, their events wait in memory",
                type(error).__name__,
                str(error)[:_MAX_ERROR],
            )
        self._failing.add(writer)

    def note_success(self, writer: WrittenStream) -> None:
        """Redis answered a writer; where others wait for their next retry, it comes now."""
        if writer not in self._failing:
            return
        self._failing.discard(writer)
        if not self._failing:
            logger.warning("agx: Redis is back, all events that waited are appended")
        elif time.monotonic() - self._retried_all > _RETRY_ALL_EVERY:
            self._retried_all = time.monotonic()
            for other in list(self._failing):
                other.retry_now()

    @property
    def buffered_events(self) -> int:
        return sum(writer.buffered for writer in self.writers)

    def longest_silence(self) -> float:
        """Return the seconds since the last event of the stream that has had none for longest."""
        now = time.monotonic()
        return max((now - writer.last_put for writer in self.writers), default=0.0)

    def close_all(self) -> None:
        """Stop the timer and all writers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for writer in (*self.writers, *self._closed.values()):
            writer.forget()
