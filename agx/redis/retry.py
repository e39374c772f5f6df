"""Retries: the delays between attempts, and commands that are repeated until Redis answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from redis.exceptions import AuthenticationError, AuthorizationError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .bus import CONNECTION_ERRORS

T = TypeVar("T")

COMMAND_TIMEOUT = 1.8  # seconds; what cannot reach Redis fails within 2 s (contract, section 3)


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


async def retry(command: Callable[[], Awaitable[T]]) -> T:
    """Return the reply to a command that may be sent twice; repeats it for 1.8 s where the connection breaks.

    Raises:
        RedisError, OSError: there was no reply in time (the error of the last attempt), or Redis refused.
    """
    backoff: Backoff | None = None
    failure: Exception | None = None
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
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
