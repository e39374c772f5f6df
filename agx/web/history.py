"""A conversation as a page that has just been opened needs it: what is stored, and what is being answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from redis.exceptions import RedisError

from ..engine import current_engine
from ..errors import RedisUnavailableError
from ..hub import StreamEntry
from ..keys import SessionKeys
from ..replay import PROMPT
from ..session import Session
from .runs import Who

_HEAD = 8  # entries among which the prompt is: behind `begin`, others may have added a few


@dataclass(frozen=True, slots=True)
class LatestRun:
    """The run that a session's stream holds."""

    run_id: str
    live: bool
    prompt: str | None  # None where it was not started by a router
    after: int  # messages of the conversation before it


async def read_latest_run(who: Who, session_id: str) -> LatestRun | None:
    """Return the run that is kept, live or ended; raises RedisUnavailableError."""
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, who.scope_id, who.user_id, session_id)
    bus = engine.control
    head = bus.execute("XRANGE", session.stream, "-", "+", "COUNT", _HEAD)
    last = bus.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
    lease = bus.execute("EXISTS", session.live)
    try:
        entries = [StreamEntry.of(*entry) for entry in await head]
        ended = any(StreamEntry.of(*entry).type == "end" for entry in await last)
        live = bool(await lease) and not ended
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("look at the session", error) from error
    if not entries or entries[0].type != "begin":
        return None
    asked: dict[str, Any] = next((entry.body for entry in entries if entry.origin == PROMPT), {})
    run_id, prompt, after = entries[0].body.get("run_id"), asked.get("prompt"), asked.get("after")
    return LatestRun(str(run_id), live, prompt, after if isinstance(after, int) else 0)


def with_prompt(session: Session, latest: LatestRun | None) -> list[ModelMessage]:
    """Return a loaded session's messages, with the prompt that is being answered and therefore not yet saved."""
    if latest is None or latest.prompt is None or len(session.msgs) > latest.after:
        return session.msgs
    return [*session.msgs, ModelRequest(parts=[UserPromptPart(latest.prompt)])]
