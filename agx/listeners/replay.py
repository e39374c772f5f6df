"""`replay()`: a stored run as pydantic-ai's own events, in the order in which its agent gave them."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import (
    AgentStreamEvent,
    BinaryContent,
    CustomEvent,
    FilePart,
    FinalResultEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelResponse,
    ModelResponsePart,
    NativeToolCallPart,
    NativeToolReturnPart,
    OutputToolCallEvent,
    OutputToolResultEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.run import AgentRunResult, AgentRunResultEvent
from pydantic_ai.tools import DeferredToolRequests

from ..engine.registry import current_engine
from ..errors import EVENTS_EXPIRED, RUN_FAILED, RUN_LOST, RUN_REPLACED, RunFailedError
from ..redis.keys import Id, SessionKeys
from ..stream.custom_events import load_chunk, load_event
from ..stream.entry import DEFERRED, PROMPT, RUNTIME, StreamEntry
from ..stream.events import Body
from .listener import follow
from .void import ResumeEvent, leave_out

Event = AgentStreamEvent | AgentRunResultEvent[DeferredToolRequests]

_Outcome = Literal["success", "failed", "denied", "interrupted", "retried"]
_OUTCOMES: dict[object, _Outcome] = {
    "ok": "success",
    "retry": "retried",
    "error": "failed",
    "denied": "denied",
    "cancelled": "interrupted",
}


@dataclass(kw_only=True)
class InfoEvent(CustomEvent, name="agx-info"):
    """What a tool added with `add_info()`; a front end gets the body (`data-agx-info`, or a CUSTOM event)."""

    body: Body

    def to_payload(self) -> Body:
        """Return the body as the tool gave it."""
        return self.body


@dataclass(kw_only=True)
class ErrorEvent(CustomEvent, name="agx-error"):
    """What a tool added with `add_error()`: it did not end the run."""

    body: Body

    def to_payload(self) -> Body:
        """Return the body as the tool gave it."""
        return self.body


async def replay(scope_id: Id, user_id: Id, session_id: Id, *, wait: float = 3) -> AsyncGenerator[Event, None]:
    """Yield a session's latest run as pydantic-ai's events: what is stored at once, then what is live, up to its end.

    For pydantic-ai's UI adapters, or any other consumer of `agent.run_stream_events()`. Model and tool events come as
    they were, with these differences: deltas may be merged, a tool call's arguments come whole, a file above 128 KiB
    and a provider's details are not on the stream, custom events come as `StreamedEvent`, and an
    `AgentRunResultEvent` comes only where the run has left calls to others: its output is the `DeferredToolRequests`.
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
    stored = follow(scope_id, user_id, session_id, wait=wait, timeout=None, after=None)
    async with aclosing(leave_out(stored, engine.hub.bus, session)) as entries:
        async for event in replay_entries(entries):
            yield event


async def replay_entries(entries: AsyncIterable[StreamEntry]) -> AsyncGenerator[Event, None]:
    """Yield the events of a run whose entries come from its `begin` on; raises as `replay()` does."""
    run = _Run()
    async for entry in entries:
        for event in run.read(entry):
            yield event
    if run.begun and not run.ended:
        raise RunFailedError(RUN_LOST.sentence, code=RUN_LOST.code)


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


def defer(*, approvals: Sequence[ToolCallPart], calls: Sequence[ToolCallPart] = ()) -> Event:
    """Return the last event of a run that leaves calls to others: to someone's approval, or to be made elsewhere."""
    requests = DeferredToolRequests(approvals=list(approvals), calls=list(calls))
    response = ModelResponse(parts=[*approvals, *calls])
    return AgentRunResultEvent(_RESULT.validate_python({"output": requests, "messages": [response]}))


_RESULT = TypeAdapter(AgentRunResult[DeferredToolRequests])


@dataclass(slots=True)
class _Run:
    """What of a run has been replayed so far."""

    begun: bool = False
    ended: bool = False
    _part: TextPart | ThinkingPart | None = None  # the one that is open
    _index: int = 0
    _pieces: list[str] = field(default_factory=list)  # its deltas
    _previous: str | None = None  # kind of the part before, within a response
    _calls: dict[str, ToolCallPart] = field(default_factory=dict)  # of the open response, not yet told as made
    _finals: dict[str, FinalResultEvent] = field(default_factory=dict)  # by the output tool's call that gave it
    _error: Body | None = None  # the run's own if its end is next, else a tool's
    _made: dict[str, ToolCallPart] = field(default_factory=dict)  # all calls
    _left: dict[str, dict[str, str]] = field(default_factory=dict)  # to others: names by id, by what is to be done

    def read(self, entry: StreamEntry) -> Iterator[Event]:
        """Yield the events that an entry stands for."""
        self.begun = True
        kind, origin, body = entry.type, entry.origin, entry.body
        if not entry.is_users:
            body.pop("seq", None)
        if kind == "end":
            yield from self._end(body)
            return
        if self._error is not None:
            yield ErrorEvent(body=self._error)
            self._error = None
        if kind == "error":
            self._error = body
        elif entry.made_here:
            self.ended = True
            kind_of_gap = RUN_REPLACED if "superseded_by" in body else EVENTS_EXPIRED
            raise RunFailedError(kind_of_gap.sentence, code=kind_of_gap.code)
        elif kind == "info" and origin == DEFERRED and not entry.is_users:
            self._left = {kind: dict(calls) for kind, calls in body.items() if isinstance(calls, dict)}
        elif kind == "info" and (origin != PROMPT or entry.is_users):
            yield InfoEvent(body=body)
        elif kind == "event":
            yield from self._read_event(body)
        elif kind == "resume" and origin == RUNTIME:
            yield from self._resume(body)

    def _end(self, body: Body) -> Iterator[Event]:
        self.ended = True
        outcome = body.get("outcome", "completed")  # a session opened by hand has none
        if outcome == "cancelled":
            raise RunCancelled("the run was cancelled")
        if outcome != "completed":
            error = self._error or {}
            raise RunFailedError(
                str(error.get("msg", RUN_FAILED.sentence)), code=str(error.get("code", RUN_FAILED.code))
            )
        yield from self._close_part(None)
        if any(self._left.values()):
            yield defer(approvals=self._calls_left("approvals"), calls=self._calls_left("calls"))

    def _calls_left(self, kind: str) -> list[ToolCallPart]:
        # One that was made by the run before, and is left to others again, has its arguments there.
        left = self._left.get(kind, {}).items()
        return [self._made.get(call_id) or ToolCallPart(name, {}, call_id) for call_id, name in left]

    def _read_event(self, body: Body) -> Iterator[AgentStreamEvent]:
        match body.get("event"):
            case "llm-begin":
                yield from self._end_response()
                self._previous = None
            case "llm-end":
                yield from self._end_response()
            case "part_start" if body.get("part_kind") == "tool-return":
                yield from self._end_response()
                yield self._tool_result(body)
            case "part_start":
                yield from self._start_part(body)
            case "part_delta":
                yield from self._add_delta(body)
            case "custom":
                if (event := load_event(body)) is not None:
                    yield event
            case "answer":
                call_id = body.get("tool_call_id")
                final = FinalResultEvent(tool_name=body.get("tool_name"), tool_call_id=call_id)
                if call_id is None:
                    yield final
                else:
                    # It was emitted when the output tool's call began; on the stream the call comes later, and whole.
                    self._finals[call_id] = final

    def _resume(self, body: Body) -> Iterator[AgentStreamEvent]:
        """End what a dead process had begun; its calls were not made."""
        yield from self._close_part(None)
        void_calls = list(self._calls)
        for call_id in void_calls:
            self._made.pop(call_id, None)
            self._finals.pop(call_id, None)
        self._calls.clear()
        self._previous = None
        if body.get("void") is not None:
            void = {"attempt": body.get("attempt"), "void": body["void"], "tool_call_ids": void_calls}
            yield ResumeEvent(body=void)

    def _end_response(self) -> Iterator[AgentStreamEvent]:
        yield from self._close_part(None)
        for call_id, call in self._calls.items():
            valid = isinstance(call.args, dict)
            if call_id in self._finals:
                yield OutputToolCallEvent(call, args_valid=valid)
            else:
                yield FunctionToolCallEvent(call, args_valid=valid)
        self._calls.clear()

    def _start_part(self, body: Body) -> Iterator[AgentStreamEvent]:
        kind = body.get("part_kind")
        part = _make_part(kind, body)
        index = int(body.get("event_idx") or 0)
        yield from self._close_part(kind)
        if part is not None:
            yield PartStartEvent(index=index, part=part, previous_part_kind=cast("Any", self._previous))
            if isinstance(part, (TextPart, ThinkingPart)):
                self._part, self._index, self._pieces = part, index, []
            elif isinstance(part, (ToolCallPart, NativeToolCallPart)):
                if isinstance(part, ToolCallPart):
                    self._calls[part.tool_call_id] = self._made[part.tool_call_id] = part
                if (final := self._finals.get(part.tool_call_id)) is not None:
                    yield final
                yield PartEndEvent(index=index, part=part)
        self._previous = kind

    def _add_delta(self, body: Body) -> Iterator[AgentStreamEvent]:
        text, index = str(body.get("content_delta", "")), int(body.get("event_idx") or 0)
        if self._part is None or self._index != index:
            # Its start was trimmed from a very long stream.
            yield from self._start_part(body | {"content": ""})
        if self._part is not None:
            self._pieces.append(text)
            delta = TextPartDelta if isinstance(self._part, TextPart) else ThinkingPartDelta
            yield PartDeltaEvent(index=index, delta=delta(content_delta=text))

    def _close_part(self, next_kind: str | None) -> Iterator[AgentStreamEvent]:
        part, self._part = self._part, None
        if part is not None:
            whole = replace(part, content="".join([part.content, *self._pieces]))
            yield PartEndEvent(index=self._index, part=whole, next_part_kind=cast("Any", next_kind))

    def _tool_result(self, body: Body) -> AgentStreamEvent:
        part = ToolReturnPart(
            tool_name=str(body.get("tool_name", "")),
            content=body.get("content"),
            tool_call_id=str(body.get("tool_call_id", "")),
            outcome=_OUTCOMES.get(body.get("tool_outcome"), "success"),
            metadata=_read_chunks(body),
        )
        for calls in self._left.values():
            calls.pop(part.tool_call_id, None)  # it was decided on within the run
        return OutputToolResultEvent(part) if part.tool_call_id in self._finals else FunctionToolResultEvent(part)


def _make_part(kind: object, body: Body) -> ModelResponsePart | None:
    """Return the part of a `part_start`; None where the stream does not hold what it is made of."""
    name, call_id = str(body.get("tool_name", "")), str(body.get("tool_call_id", ""))
    if kind == "text":
        return TextPart(str(body.get("content", "")))
    if kind == "thinking":
        return ThinkingPart(str(body.get("content", "")))
    if kind == "tool-call":
        return ToolCallPart(name, _read_args(body), call_id)
    if kind == "builtin-tool-call":
        return NativeToolCallPart(name, _read_args(body), call_id)
    if kind == "file" and isinstance(body.get("data"), str) and "truncated" not in body:
        return FilePart(BinaryContent(base64.b64decode(body["data"]), media_type=str(body.get("media_type"))))
    if kind == "builtin-tool-return":
        outcome = _OUTCOMES.get(body.get("tool_outcome"), "success")
        return NativeToolReturnPart(name, body.get("content"), call_id, outcome=outcome)
    return None


def _read_chunks(body: Body) -> list[Any] | None:
    """Return the chunks for front ends that a tool returned; None where there are none, or their size was cut."""
    chunks = body.get("chunks")
    if not isinstance(chunks, list):
        return None
    loaded = []
    for chunk in chunks:
        with suppress(ValidationError, ImportError, AttributeError):  # another protocol's, not installed here
            loaded.append(load_chunk(chunk))
    return loaded or None


def _read_args(body: Body) -> str | dict[str, Any]:
    args = body.get("args")
    if isinstance(args, dict):
        return args["raw"] if args.keys() == {"raw"} and isinstance(args["raw"], str) else args
    # Cut for their size (`"truncated": true`).
    return args if isinstance(args, str) else orjson.dumps(args).decode()
