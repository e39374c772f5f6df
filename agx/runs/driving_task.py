"""The task that drives a run: whether it was cancelled, and work that its cancellation must not interrupt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

import anyio

logger = logging.getLogger("agx")

_STALL = 0.5  # seconds by which a timer is late where the process did not run

T = TypeVar("T")


class DrivingTask:
    """Holds the task in which an agent works.

    A `CancelledError` alone does not show that the task was cancelled: awaiting a future that is cancelled raises one,
    too. Only the task's own count of cancellations shows it.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._before = 0
        self.note()

    def note(self) -> None:
        """Take the current task as the one that drives the run from here on."""
        task = asyncio.current_task()
        if task is not None and task is not self._task:
            self._task, self._before = task, task.cancelling()

    @property
    def is_cancelled(self) -> bool:
        """Whether the task was cancelled since it drives the run, and nobody has taken the cancellation back."""
        return self._task is not None and self._task.cancelling() > self._before


async def run_to_end(work: Awaitable[T]) -> T:
    """Await something to its end whatever cancellations arrive; a cancellation is raised afterwards, never lost.

    AnyIO delivers the cancellation of a scope again and again, so it is kept out by a shield of AnyIO's own. It raises
    at the caller's next await.
    """
    task = asyncio.ensure_future(work)
    try:
        await wait_to_end(task)
    except asyncio.CancelledError:
        if not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("agx: a run's cleanup failed after it was cancelled", exc_info=failure)
        raise
    return task.result()


async def wait_to_end(task: asyncio.Future[Any], seconds: float | None = None) -> bool:
    """Wait until a task is done, at most some seconds, whatever cancellations arrive; returns whether it is done.

    Time in which the process was stopped does not count. A cancellation is raised afterwards, as by `run_to_end()`.
    """
    loop = asyncio.get_running_loop()
    due = None if seconds is None else loop.time() + seconds
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            left = None if due is None else due - loop.time()
            if seconds is not None and left is not None and left <= 0:
                if left > -_STALL:
                    break
                due, left = loop.time() + seconds, seconds
            try:
                await asyncio.wait({task}, timeout=left)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.done()
