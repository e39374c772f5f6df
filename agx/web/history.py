"""A conversation as a page that has just been opened needs it: what is stored, and what is being answered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from redis.exceptions import RedisError

from ..engine.registry import current_engine
from ..errors import RedisUnavailableError
from ..redis.entry_id import format_id
from ..redis.keys import SessionKeys
from ..sessions.base import Session, SessionStore
from ..stream.entry import PROMPT, StreamEntry
from .lost_answer import read_lost_answer
from .runs import Who
from .turns import close_calls, end_of_prompt

# Of what is sent to the model; the rest are instructions of many kinds.
_SHOWN = frozenset({"user-prompt", "tool-return", "retry-prompt"})
_HEAD = 8  # entries among which the prompt is: behind `begin`, others may have added a few


@dataclass(frozen=True, slots=True)
class Asked:
    """How a router started a run: its prompt, if it has one, and behind how many messages it goes on."""

    prompt: str | None
    after: int
    stamp: str  # pydantic-ai's id of the run


@dataclass(frozen=True, slots=True)
class LatestRun:
    """The run that a session's stream holds."""

    run_id: str
    live: bool
    outcome: str | None  # lost: its process died, and no sidecar has ended it yet; None while it is live
    last_event_id: str
    asked: Asked | None  # None where no router started it


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
        latest = [StreamEntry.of(*entry) for entry in await last]
        end = next((entry for entry in latest if entry.type == "end"), None)
        live = end is None and (bool(await lease) or await engine.is_recoverable(session))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("look at the session", error) from error
    if not entries or not latest or entries[0].type != "begin":
        return None
    # The last one is that of the attempt that began: a process may have died right before.
    asked = next((asked for entry in reversed(entries) if (asked := _read_asked(entry)) is not None), None)
    outcome = (None if live else "lost") if end is None else end.body.get("outcome")
    outcome = outcome if isinstance(outcome, str) else None
    return LatestRun(str(entries[0].body.get("run_id")), live, outcome, format_id(latest[0].id), asked)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A loaded session as its user may see it, with the prompt that is being answered and therefore not yet saved."""

    session: Session
    latest: LatestRun | None
    live: bool  # the latest run is under way, and its messages are not yet among the session's
    opening: list[ModelMessage]  # what the latest run's answer begins with, where it goes on with decided calls
    lost: str | None  # the last prompt, where its run has ended and the store does not have it

    @property
    def run_id(self) -> str | None:
        return None if self.latest is None else self.latest.run_id


async def read_conversation(sessions: SessionStore, who: Who, session_id: str) -> Conversation:
    """Load a session and look at its latest run; raises RedisUnavailableError, and what the store raises."""
    # First the run: of one that ends meanwhile everything is either stored or still on its stream.
    latest = await read_latest_run(who, session_id)
    session = sessions.open(who.scope_id, who.user_id, session_id)
    await session.load()
    live = latest is not None and latest.live
    opening: list[ModelMessage] = []
    lost: str | None = None
    if latest is not None and latest.asked is not None:
        prompt = latest.asked.prompt
        asked = session.msgs[: latest.asked.after]
        if prompt is not None:
            asked.append(ModelRequest(parts=[UserPromptPart(prompt)]))
        opening = asked[end_of_prompt(asked) :]
        if any(message.run_id == latest.asked.stamp for message in session.msgs):
            live = False
        elif live or prompt is not None:
            is_stored = end_of_prompt(session.msgs) > latest.asked.after  # by the session's `begin()`
            session.msgs = asked
            if not live:
                session.msgs += await read_lost_answer(who.scope_id, who.user_id, session_id)
                lost = None if is_stored else prompt
    session.msgs = _without_instructions(close_calls(session.msgs))
    return Conversation(session, latest, live, _without_instructions(opening), lost)


def _read_asked(entry: StreamEntry) -> Asked | None:
    """Return what a router's run has put on its stream; None for any other entry, which may be anybody's."""
    if entry.origin != PROMPT or entry.is_users:
        return None
    body = entry.body
    prompt, after, stamp = body.get("prompt"), body.get("after"), body.get("stamp")
    if isinstance(prompt, str | None) and isinstance(after, int) and isinstance(stamp, str):
        return Asked(prompt, after, stamp)
    return None  # a steered prompt has no stamp


def _without_instructions(messages: list[ModelMessage]) -> list[ModelMessage]:
    """Leave out the agent's instructions: they are not for the browser."""
    shown: list[ModelMessage] = []
    for message in messages:
        if isinstance(message, ModelRequest):
            parts = [part for part in message.parts if part.part_kind in _SHOWN]
            if parts:
                shown.append(replace(message, parts=parts, instructions=None))
        else:
            shown.append(message)
    return shown
