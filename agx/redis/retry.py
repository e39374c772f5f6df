"""Retries: the delays between attempts, how long a reply is waited for, and commands that are repeated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from redis.exceptions import AuthenticationError, AuthorizationError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .bus import CONNECTION_ERRORS

T = TypeVar("T")

COMMAND_TIMEOUT = 1.8  # seconds; what cannot reach Redis fails within 2 s (contract, section 3)
_TICK = 0.1  # seconds of `reply_timeout()`


@dataclass(slots=True)
class Backoff:
    """The delays between attempts, in seconds: each is twice the one before, from `first` up to `last`.

    A value without tasks or timers, so that a callback of a timer can use it as well as a loop that awaits.
    """

    first: float
    last: float
    jitter: float = 0.0  # 0.2: each delay is up to a fifth shorter or longer, so that processes do not retry in step
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.first

    @property
    def is_waiting(self) -> bool:
        """Whether an attempt failed since the last `reset()`."""
        return self._next > self.first

    def next(self) -> float:
        """Return the delay before the next attempt."""
        delay, self._next = self._next, min(self._next * 2, self.last)
        return delay * random.uniform(1 - self.jitter, 1 + self.jitter) if self.jitter else delay

    def reset(self) -> None:
        """Begin with the first delay again: an attempt succeeded."""
        self._next = self.first


@asynccontextmanager
async def reply_timeout() -> AsyncIterator[None]:
    """Raise TimeoutError after 1.8 s in which this process could have received a reply.

    The time is counted in ticks of 0.1 s. While the process is stopped, or its loop is busy, at most one tick passes. A
    worker that begins hundreds of runs at once reads a reply long after Redis has sent it.
    """
    loop, ticks = asyncio.get_running_loop(), COMMAND_TIMEOUT / _TICK
    timer: asyncio.TimerHandle

    def tick() -> None:
        nonlocal ticks, timer
        ticks -= 1
        if ticks > 0:
            timer = loop.call_later(_TICK, tick)
        else:
            timeout.reschedule(loop.time())

    timer = loop.call_later(_TICK, tick)
    async with asyncio.timeout(None) as timeout:
        try:
            yield
        finally:
            timer.cancel()


async def retry(command: Callable[[], Awaitable[T]]) -> T:
    """Return the reply to a command that may be sent twice; repeats it for 1.8 s where the connection breaks.

    Raises:
        RedisError, OSError: there was no reply in time (the error of the last attempt), or Redis refused.
    """
    backoff: Backoff | None = None
    failure: Exception | None = None
    try:
        async with reply_timeout():
            while True:
                try:
                    return await command()
                except (AuthenticationError, AuthorizationError):
                    raise
                except CONNECTION_ERRORS as error:
                    failure = error
                backoff = backoff or Backoff(0.05, 0.2)
                await asyncio.sleep(backoff.next())
    except TimeoutError:
        failure = failure or RedisTimeoutError(f"no reply within {COMMAND_TIMEOUT} s")
    raise failure
