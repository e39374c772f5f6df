"""Runs that this process is starting: their `begin` is not appended yet, and a listener waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from ..redis.keys import SessionKeys

# By stream. Shared by all loops of the process: a listener may work in another loop than the run.
_starting: dict[str, list[Future[None]]] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def starting(session: SessionKeys) -> Iterator[None]:
    """Mark a run as starting for the duration of the block; the block ends when its `begin` is appended, or failed."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()  # a listener that stops waiting must not cancel it for the others
    with _lock:
        _starting.setdefault(session.stream, []).append(done)
    try:
        yield
    finally:
        with _lock:
            entered = _starting.get(session.stream, [])
            if done in entered:
                entered.remove(done)
            if not entered:
                _starting.pop(session.stream, None)
        done.set_result(None)


async def wait_for_starting(session: SessionKeys) -> None:
    """Wait for the `begin` of a run that this process is starting, if there is one.

    A listener that follows right after `create_task(run(...))` then gets that run instead of a replay of the last one.
    """
    await asyncio.sleep(0)  # a task that was created just before takes its first step here
    with _lock:
        entered = list(_starting.get(session.stream, ()))
    for done in entered:
        await asyncio.wrap_future(done)


# The runs belong to the parent's loops; nothing in the child would ever complete them.
os.register_at_fork(after_in_child=_starting.clear)
