"""The server's time, by which ids are given and deadlines are set."""

from __future__ import annotations

import time


class ServerClock:
    """The server's time, carried on by the monotonic clock since it was last told."""

    def __init__(self) -> None:
        self._offset_ms = time.time() * 1_000 - time.monotonic() * 1_000

    def sync(self, server_ms: int, asked: float) -> None:
        """Take over what a script's TIME said; `asked`: the monotonic time at which it was sent."""
        # It was said between the question and now: half of that is the best guess.
        self._offset_ms = server_ms - (asked + time.monotonic()) * 500

    def at_least(self, server_ms: int) -> None:
        """Learn that the server's time is not before this, as a mark of its own shows: no latency comes out negative."""
        self._offset_ms = max(self._offset_ms, server_ms - time.monotonic() * 1_000)

    def now_ms(self) -> int:
        return int(self._offset_ms + time.monotonic() * 1_000)
