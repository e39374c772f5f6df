"""The supervisor: runs the long-lived tasks of an engine and restarts those that raise."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from .retry import Backoff

logger = logging.getLogger("agx")

_RESTART_FIRST, _RESTART_LAST = 0.05, 2.0  # seconds before a restart; the wait doubles from the first to the last
_STEADY = 10.0  # seconds without an error after which the next error is logged again


class Supervisor:
    """Keeps background work alive: leases are renewed, messages received, facts sent, whatever one attempt raises.

    Each failure is counted by the name of the work; the first one of a series is logged with its traceback.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()  # by name
        self._failed_at: dict[str, float] = {}

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], *, name: str) -> asyncio.Task[None]:
        """Run `work()` in a task until it returns or the task is cancelled; start it again when it raises."""
        return asyncio.get_running_loop().create_task(self._run(work, name), name=name)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        backoff = Backoff(_RESTART_FIRST, _RESTART_LAST)
        while True:
            try:
                return await work()
            except (Exception, asyncio.CancelledError) as error:
                # A future that someone else cancelled ends `work`, too; only a task that was cancelled itself stops.
                if task.cancelling():
                    raise
                if self.note(error, name):
                    backoff.reset()
            await asyncio.sleep(backoff.next())

    def call(self, work: Callable[[], object], *, name: str) -> bool:
        """Call `work()` from a timer or a callback; returns False where it raised, which is logged and counted.

        It awaits nothing, so a `CancelledError` that it raises is no cancellation of the task.
        """
        try:
            work()
        except (Exception, asyncio.CancelledError) as error:
            self.note(error, name)
            return False
        return True

    def note(self, error: BaseException, name: str) -> bool:
        """Count a failure and log the first one of a series; returns whether it is the first."""
        now = time.monotonic()
        is_new = now - self._failed_at.get(name, float("-inf")) > _STEADY
        self._failed_at[name] = now
        self.failures[name] += 1
        if is_new:
            logger.error("agx: %s failed and goes on (%s)", name, type(error).__name__, exc_info=error)
        return is_new
