"""A conversation as a page that has just been opened needs it: what is stored, and what is being answered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from redis.exceptions import RedisError

from ..engine import current_engine
from ..errors import RedisUnavailableError
from ..hub import StreamEntry
from ..keys import SessionKeys
from ..replay import PROMPT
from ..session import Session, SessionStore
from .runs import Who

# Of what is sent to the model; the rest are instructions of many kinds.
_SHOWN = frozenset({"user-prompt", "tool-return", "retry-prompt"})
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


@dataclass(frozen=True, slots=True)
class Conversation:
    """A loaded session as its user may see it, with the prompt that is being answered and therefore not yet saved."""

    session: Session
    latest: LatestRun | None

    @property
    def run_id(self) -> str | None:
        return None if self.latest is None else self.latest.run_id

    @property
    def live(self) -> bool:
        return self.latest is not None and self.latest.live


async def read_conversation(sessions: SessionStore, who: Who, session_id: str) -> Conversation:
    """Load a session and look at its latest run; raises RedisUnavailableError, and what the store raises."""
    session = sessions.open(who.scope_id, who.user_id, session_id)
    await session.load()
    latest = await read_latest_run(who, session_id)
    saved = len(session.msgs)
    session.msgs = _without_instructions(session.msgs)
    if latest is not None and latest.prompt is not None and saved <= latest.after:
        session.msgs = [*session.msgs, ModelRequest(parts=[UserPromptPart(latest.prompt)])]
    return Conversation(session, latest)


def _without_instructions(messages: list[ModelMessage]) -> list[ModelMessage]:
    """Leave out what the service tells the model: it is not for the browser."""
    shown: list[ModelMessage] = []
    for message in messages:
        if isinstance(message, ModelRequest):
            parts = [part for part in message.parts if part.part_kind in _SHOWN]
            if parts:
                shown.append(replace(message, parts=parts, instructions=None))
        else:
            shown.append(message)
    return shown
