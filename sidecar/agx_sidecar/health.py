"""Decides whether this replica is alive (its main loop runs) and ready (Redis answers, and /metrics renders)."""

from __future__ import annotations

import asyncio
import time

from .link import Link

READY_WITHIN = 10.0  # seconds since Redis last answered
ALIVE_WITHIN = 10.0  # seconds since the main loop last ticked
_TICK = 1.0  # seconds


class Health:
    """Written by the main loop and by /metrics, read by the probes in the thread of the pages."""

    def __init__(self, link: Link) -> None:
        self.render_error: str | None = None  # why the last rendering of /metrics failed
        self._link = link
        self._ticked = time.monotonic()

    async def tick(self) -> None:
        """Record once a second that the main loop runs."""
        while True:
            self._ticked = time.monotonic()
            await asyncio.sleep(_TICK)

    def why_not_alive(self) -> str | None:
        """Return why the process has to be restarted, or None."""
        age = time.monotonic() - self._ticked
        return f"the event loop has not ticked for {age:.0f} s" if age > ALIVE_WITHIN else None

    def why_not_ready(self) -> str | None:
        """Return why this replica does not do its work, or None."""
        if time.monotonic() - self._link.last_reply > READY_WITHIN:
            return f"Redis has not answered within {READY_WITHIN:.0f} s: {self._link.last_error}"
        if self.render_error is not None:
            return f"/metrics can't be rendered: {self.render_error}"
        return None
