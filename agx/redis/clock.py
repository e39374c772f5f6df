"""The server's time, by which ids are given and deadlines are set."""

from __future__ import annotations

import time


class ServerClock:
    """The server's time, carried on by the monotonic clock since the last reply with a time."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def sync(self, server_ms: int, asked_ns: int) -> None:
        """Set the clock from a script's TIME; `asked_ns`: the monotonic time at which the script was sent."""
        # The server read it between sending and now: the middle is the best estimate.
        self._offset_ns = server_ms * 1_000_000 - (asked_ns + time.monotonic_ns()) // 2

    def at_least(self, server_ms: int) -> None:
        """Learn from a mark of the server's own that its time is not before this."""
        self._offset_ns = max(self._offset_ns, server_ms * 1_000_000 - time.monotonic_ns())

    def now_ms(self) -> int:
        return (self._offset_ns + time.monotonic_ns()) // 1_000_000
