"""`cancel()`: any process stops a run of any other; one publication, and the marked lease that can't be missed."""

from __future__ import annotations

from redis.exceptions import RedisError

from ..errors import RedisUnavailableError
from ..redis.bus import Bus, Script
from ..redis.keys import Id, SessionKeys
from ..redis.retry import reach
from .registry import current_engine

# The first mark wins, so the latency that is measured is the first caller's. A seed client's lease is the value 1 and
# its run looks only whether the key is there.
_CANCEL = Script("""
local held = redis.call('GET', KEYS[1])
if not held then return 0 end
if ARGV[2] and held ~= ARGV[2] and string.find(held, 'cancel:' .. ARGV[2] .. ':', 1, true) ~= 1 then return 0 end
if held == '1' then
  redis.call('DEL', KEYS[1])
elseif string.sub(held, 1, 7) ~= 'cancel:' then
  local t = redis.call('TIME')
  held = 'cancel:' .. held .. ':' .. string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000))
  redis.call('SET', KEYS[1], held, 'KEEPTTL')
end
redis.call('PUBLISH', ARGV[1], held)
return 1
""")


async def mark_cancelled(bus: Bus, session: SessionKeys, run_id: str | None = None) -> bool:
    """Mark a session's lease and tell its run; returns whether there was one.

    `run_id`: only this run; None takes whichever is live. Raises RedisError or OSError.
    """
    only = () if run_id is None else (run_id,)
    return bool(await bus.run(_CANCEL, session.live, session.cancel_channel, *only))


async def cancel(scope_id: Id, user_id: Id, session_id: Id) -> bool:
    """Stop a session's live run, wherever it runs; returns whether there was one.

    The run ends by itself a moment later: follow it with `listen()` to see its `end`.

    Raises:
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
        RedisUnavailableError: nobody could be told.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    try:
        return await reach(lambda: mark_cancelled(engine.control, session))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("cancel the run", error) from error
