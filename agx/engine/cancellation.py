"""`cancel()`: any process stops a run of any other; one publication, and the marked lease that can't be missed."""

from __future__ import annotations

import asyncio
import time

from redis.exceptions import RedisError

from ..errors import RedisUnavailableError
from ..redis.bus import Bus
from ..redis.keys import Id, SessionKeys
from ..redis.live_key import MARK_CANCELLED
from ..redis.retry import retry
from .registry import current_engine

_CLAIM_WAIT = 1.0  # seconds a cancel waits for a recovery that looks whether the run was lost
_CLAIM_POLL = 0.05


async def mark_cancelled(bus: Bus, session: SessionKeys, run_id: str | None = None) -> bool:
    """Mark a session's lease and publish the mark; returns whether there was a live run to cancel.

    While a recovery claims the session it is not decided whether its run lives, so this waits for the decision.

    Args:
        run_id: only this run; None takes whichever is live.

    Raises:
        RedisError, OSError: not marked as far as is known.
    """
    only = () if run_id is None else (run_id,)
    deadline = time.monotonic() + _CLAIM_WAIT
    while (reply := await bus.run(MARK_CANCELLED, session.live, session.cancel_channel, *only)) == b"claimed":
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_CLAIM_POLL)
    return bool(reply == b"marked")


async def cancel(scope_id: Id, user_id: Id, session_id: Id) -> bool:
    """Stop a session's live run, wherever it runs; returns whether there was one.

    The run ends by itself a moment later: follow it with `listen()` to see its `end`.

    Raises:
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
        RedisUnavailableError: Redis can't be reached, so the run was not cancelled as far as is known.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    try:
        return await retry(lambda: mark_cancelled(engine.control, session))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("cancel the run", error) from error
