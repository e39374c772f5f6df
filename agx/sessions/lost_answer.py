"""What a lost run had answered, taken from its stream while that exists: nobody was left to save it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import (
    FunctionToolResultEvent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    UserPromptPart,
)
from redis.exceptions import RedisError

from ..engine.registry import current_engine
from ..errors import RedisUnavailableError, RunFailedError
from ..listeners.replay import replay_entries
from ..listeners.replayed_run import Event
from ..listeners.void import ResumeEvent, find_voids, is_void
from ..redis.keys import Id, SessionKeys
from ..stream.entry import StreamEntry


async def read_lost_answer(scope_id: Id, user_id: Id, session_id: str) -> list[ModelMessage]:
    """Return the messages that the session's latest run gave before its process died; nothing for any other run.

    Raises:
        RedisUnavailableError: Redis can't be reached.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    try:
        live = engine.control.execute("EXISTS", session.live)
        last = engine.control.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
        if await live or not await last or _has_ended([StreamEntry.of(*last.result()[0])]):
            return []  # the usual case, without a read of the whole stream
        if await engine.is_recoverable(session):
            return []
        found = await engine.control.execute("XRANGE", session.stream, "-", "+")
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("look at the session", error) from error
    entries = [StreamEntry.of(*entry) for entry in found]
    voids = find_voids(entries)
    entries = [entry for entry in entries if not is_void(entry, voids)]
    if not entries or entries[0].type != "begin" or _has_ended(entries):
        return []
    return await _rebuild(entries)


def _has_ended(entries: list[StreamEntry]) -> bool:
    """Return whether there is an `end`, and the last one is not that of a lost run."""
    outcomes = [entry.body.get("outcome") for entry in entries if entry.type == "end"]
    return bool(outcomes) and outcomes[-1] != "lost"


def append_answer(messages: list[ModelMessage], answer: list[ModelMessage]) -> list[ModelMessage]:
    """Return a conversation with the answer after the prompt that its end awaits one for."""
    last = messages[-1] if messages else None
    awaits = isinstance(last, ModelRequest) and any(isinstance(part, UserPromptPart) for part in last.parts)
    return [*messages, *answer] if awaits else messages


async def _rebuild(entries: list[StreamEntry]) -> list[ModelMessage]:
    async def stored() -> AsyncIterator[StreamEntry]:
        for entry in entries:
            yield entry

    messages: list[ModelMessage] = []
    parts: list[Any] = []
    with suppress(RunFailedError, RunCancelled):  # it was lost
        async for event in replay_entries(stored()):
            add_event(event, messages, parts)
    if parts:
        messages.append(ModelResponse(parts=parts, state="interrupted"))
    return messages


def add_event(event: Event, messages: list[ModelMessage], parts: list[Any]) -> None:
    """Add the content of an event to the messages; `parts` are those of the response that is open."""
    if isinstance(event, ResumeEvent):
        parts.clear()  # they are void
    elif isinstance(event, PartStartEvent):
        parts.append(event.part)
    elif isinstance(event, PartDeltaEvent) and parts:
        parts[-1] = event.delta.apply(parts[-1])
    elif isinstance(event, PartEndEvent) and parts:
        parts[-1] = event.part
    elif isinstance(event, FunctionToolResultEvent):
        if parts:
            messages.append(ModelResponse(parts=list(parts)))
            parts.clear()
        messages.append(ModelRequest(parts=[event.part]))
