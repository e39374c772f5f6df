"""Asking Redis for what has to have its answer: again where a connection broke, for less than 2 s (contract, 3)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import AuthenticationError, AuthorizationError

from .bus import CONNECTION_ERRORS

T = TypeVar("T")

COMMAND_TIMEOUT = 1.8  # seconds; what cannot reach Redis fails within 2 s
_AGAIN = 0.05


async def reach(ask: Callable[[], Awaitable[T]]) -> T:
    """Return the answer to a question that may be asked twice.

    Raises:
        RedisError, OSError: there was no answer in time, or Redis refused.
    """
    trouble: BaseException | None = None
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            while True:
                try:
                    return await ask()
                except (AuthenticationError, AuthorizationError):
                    raise
                except CONNECTION_ERRORS as error:
                    trouble = error
                await asyncio.sleep(_AGAIN)
    except TimeoutError:
        if trouble is not None:
            raise trouble from None
        raise
