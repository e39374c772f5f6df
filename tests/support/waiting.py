"""Waiting for a fact: the one place where tests poll, so that none of them sleeps."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_INTERVAL = 0.005  # seconds
_LONGEST_INTERVAL = 0.1  # seconds; of a condition that is expensive to evaluate, as a scrape is


async def wait_until(
    condition: Callable[[], T | Awaitable[T | None] | None], timeout: float = 30, *, what: str | None = None
) -> T:
    """Return the condition's value once it is true; raise AssertionError after `timeout` seconds.

    The condition may be a function or a coroutine function. What it raises is raised, except an AssertionError, which
    means not yet.
    """
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        last: object
        try:
            value = condition()
            result: T | None = await value if inspect.isawaitable(value) else value
            if result:
                return result
            last = result
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(_expired(condition, timeout, what, last))
        await asyncio.sleep(_pause(began))


def wait_until_sync(condition: Callable[[], T | None], timeout: float = 30, *, what: str | None = None) -> T:
    """The same without an event loop."""
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        last: object
        try:
            if result := condition():
                return result
            last = result
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(_expired(condition, timeout, what, last))
        time.sleep(_pause(began))


def _pause(began: float) -> float:
    """Return the seconds until the next evaluation: four times as long as the last one took, within limits."""
    return min(max(_INTERVAL, 4 * (time.monotonic() - began)), _LONGEST_INTERVAL)


def _expired(condition: Callable[[], object], timeout: float, what: str | None, last: object) -> str:
    try:
        said = what or inspect.getsource(condition).strip()
    except (OSError, TypeError):
        said = repr(condition)
    return f"not within {timeout} s: {said}\nlast seen: {last!r}"
