"""`steer()`: gives the live run of a session a message, from any process."""

from __future__ import annotations

import uuid

from redis.exceptions import RedisError

from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import QueueFullError, RedisUnavailableError, TextError
from ..redis.keys import Id, SessionKeys, check_id
from ..redis.live_key import parse_live
from ..redis.retry import retry
from ..stream.entry import StreamEntry
from .inbox import MAX_TEXT, MAX_WAITING, OWN_KEY, Inbox


async def steer(scope_id: Id, user_id: Id, session_id: Id, text: str, *, key: str | None = None) -> bool:
    """Give a session's live run a message; returns False where nothing runs.

    The model gets the message with its next request, once, whatever process dies meanwhile. A run that has its answer
    already asks its model once more. A message that a run can no longer take is stored in the conversation.

    Args:
        text: what the user adds; at most 32,768 bytes of UTF-8.
        key: makes a repeat harmless: a second message with this key is not added.

    Raises:
        QueueFullError: 50 messages of the session wait already.
        TextError: the text is empty, too long, or can't be encoded.
        TypeError: an id or the text has a wrong type.
        ValueError: an id or the key has a character that none may have.
        RedisUnavailableError: Redis can't be reached; repeat the call with the same key.
    """
    session = SessionKeys.of(current_engine().config.key_prefix, scope_id, user_id, session_id)
    return await send_message(session, text, key) is not None


async def send_message(session: SessionKeys, text: str, key: str | None) -> str | None:
    """Do what `steer()` does, and return the id of the run that takes the message; None where none does."""
    engine = current_engine()
    _check_text(text)
    # A command that is sent again after a broken connection must not add a second message.
    own_key = OWN_KEY + uuid.uuid4().hex if key is None else check_id(key, "key")
    try:
        run_id = await retry(lambda: _find_run(engine, session))
        if run_id is None:
            return None
        reply = await retry(lambda: Inbox(engine.control, session).put(run_id, own_key, text))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("steer the run", error) from error
    if reply == "full":
        raise QueueFullError(f"session {session.session!r}", f"{MAX_WAITING} messages")
    return run_id if reply == "put" else None


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise TextError("the text must be one that UTF-8 can encode") from None
    if not 0 < size <= MAX_TEXT:
        raise TextError(f"the text must have 1 to {MAX_TEXT} bytes, not {size}")


async def _find_run(engine: Engine, session: SessionKeys) -> str | None:
    """Return the run that takes messages: it is live and not cancelled, or another process can resume it."""
    held, first = (
        engine.control.execute("GET", session.live),
        engine.control.execute("XRANGE", session.stream, "-", "+", "COUNT", 1),
    )
    begin = StreamEntry.of(*found[0]).body if (found := await first) else {}
    if (raw := await held) is None:
        return str(begin.get("run_id")) if await engine.is_recoverable(session) else None
    value = parse_live(raw)
    if value.kind != "held" or (begin.get("manual") is True and begin.get("run_id") == value.run_id):
        return None
    return value.run_id
