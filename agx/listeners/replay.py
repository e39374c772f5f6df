"""`replay()`: a stored run as pydantic-ai's own events, in the order in which its agent gave them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator

from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelResponse,
    PartEndEvent,
    PartStartEvent,
    ToolReturnPart,
)

from ..engine.registry import current_engine
from ..redis.keys import Id, SessionKeys
from ..stream.entry import StreamEntry
from .listener import join
from .replayed_run import Event, ReplayedRun, merge_deltas
from .void import is_void, read_voids


async def replay(scope_id: Id, user_id: Id, session_id: Id, *, wait: float = 3) -> AsyncGenerator[Event, None]:
    """Yield a session's latest run as pydantic-ai's events: what is stored at once, then what is live, up to its end.

    For pydantic-ai's UI adapters, or any other consumer of `agent.run_stream_events()`. Model and tool events come as
    they were, with these differences: deltas may be merged, a tool call's arguments come whole, a file above 128 KiB
    and a provider's details are not on the stream, custom events come as `StreamedEvent`, and an
    `AgentRunResultEvent` comes only where the run has left calls to others: its output is the `DeferredToolRequests`.
    Steps of sub-agents come as `SubAgentEvent`, which has pydantic-ai's event.
    An answer that a dead process began is left out, as the process that resumed the run asked again. Where a part of it
    was given before, the part ends, and a `ResumeEvent` names it.

    Args:
        wait: seconds to wait for a first event.

    Raises:
        RunCancelled: the run was cancelled, after its last event.
        RunFailedError: the run failed, was lost, or was replaced by another; likewise after its last event.
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    run = ReplayedRun()
    with await join(scope_id, user_id, session_id, wait=wait, timeout=None, after=None) as follower:
        voids = await read_voids(engine.hub.bus, session)
        while (entries := await follower.next()) is not None:
            events: list[Event] = []
            try:
                for entry in entries:
                    if not is_void(entry, voids):
                        events += run.read(entry)
            finally:  # also where an entry is the end of a run that failed
                for event in merge_deltas(events):
                    yield event
    run.check_end()


async def replay_entries(entries: AsyncIterable[StreamEntry]) -> AsyncGenerator[Event, None]:
    """Yield the events of a run whose entries come from its `begin` on; raises as `replay()` does."""
    run = ReplayedRun()
    async for entry in entries:
        for event in run.read(entry):
            yield event
    run.check_end()


def replay_messages(messages: Iterable[ModelMessage]) -> Iterator[AgentStreamEvent]:
    """Yield the events that gave a part of a stored conversation: each of its parts whole, calls and their results."""
    for message in messages:
        if isinstance(message, ModelResponse):
            kinds = [None, *(part.part_kind for part in message.parts), None]
            for index, part in enumerate(message.parts):
                yield PartStartEvent(index=index, part=part, previous_part_kind=kinds[index])
                yield PartEndEvent(index=index, part=part, next_part_kind=kinds[index + 2])
            for call in message.tool_calls:
                yield FunctionToolCallEvent(call, args_valid=True)
        else:
            for returned in message.parts:
                if isinstance(returned, ToolReturnPart):
                    yield FunctionToolResultEvent(returned)
