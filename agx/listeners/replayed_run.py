"""The replay of one run: entries of its stream become pydantic-ai's events."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import (
    AgentStreamEvent,
    CustomEvent,
    FinalResultEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelResponse,
    NativeToolCallPart,
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
)
from pydantic_ai.run import AgentRunResult, AgentRunResultEvent
from pydantic_ai.tools import DeferredToolRequests

from ..error_codes import EVENTS_EXPIRED, RUN_FAILED, RUN_LOST, RUN_REPLACED
from ..errors import RunFailedError
from ..stream.custom_events import load_event
from ..stream.entry import DEFERRED, PROMPT, RUNTIME, Body, StreamEntry
from .message_parts import load_part, load_return
from .void import ResumeEvent, void_runs

logger = logging.getLogger("agx")

_END_FIELDS = ("outcome", "reason", "msg", "code")  # of a sub-agent's `run-end`, for pages

Event = AgentStreamEvent | AgentRunResultEvent[DeferredToolRequests]


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


@dataclass(kw_only=True)
class SubAgentEvent(CustomEvent, name="agx-sub-agent", ui=False):
    """A step of a sub-agent. It is no event of the run itself, and pydantic-ai's adapters ignore it.

    Args:
        run: the sub-agent's run.
        parent_run: the run that called it.
        agent: its agent's name.
        parent_tool_call_id: the tool call of `parent_run` that runs it.
        depth: 1 in a tool of the session's run, 2 in a tool of such a sub-agent.
        event: pydantic-ai's own; None where the sub-agent begins or ends.
        end: None until it ends; then its `outcome` and `reason`, and `msg` and `code` of an error. With `void`, nothing
            that it did counts; such an event may follow its end.
    """

    run: str
    parent_run: str
    agent: str
    parent_tool_call_id: str
    depth: int
    event: AgentStreamEvent | None = None
    end: Body | None = None

    def to_payload(self) -> Body:
        """Return the fields that name the sub-agent."""
        names = ("run", "parent_run", "agent", "parent_tool_call_id", "depth")
        return {name: getattr(self, name) for name in names}


def defer(*, approvals: Sequence[ToolCallPart], calls: Sequence[ToolCallPart] = ()) -> Event:
    """Return the last event of a run that leaves calls to others: to someone's approval, or to be made elsewhere."""
    requests = DeferredToolRequests(approvals=list(approvals), calls=list(calls))
    response = ModelResponse(parts=[*approvals, *calls])
    return AgentRunResultEvent(_RESULT.validate_python({"output": requests, "messages": [response]}))


_RESULT = TypeAdapter(AgentRunResult[DeferredToolRequests])


@dataclass(slots=True)
class ReplayedRun:
    """The replay of one run: which parts and calls are open, and what ended them."""

    begun: bool = False
    ended: bool = False
    _part: TextPart | ThinkingPart | None = None  # the one that is open
    _index: int = 0
    _pieces: list[str] = field(default_factory=list)  # its deltas
    _previous: str | None = None  # kind of the part before, within a response
    _calls: dict[str, ToolCallPart] = field(
        default_factory=dict
    )  # of the open response, whose events are not given yet
    _finals: dict[str, FinalResultEvent] = field(default_factory=dict)  # by the output tool's call that gave it
    _error: Body | None = None  # the run's own if its end is next, else a tool's
    _made: dict[str, ToolCallPart] = field(default_factory=dict)  # all calls
    _sub_agents: dict[str, SubAgentEvent] = field(default_factory=dict)  # by run
    _open: dict[str, ReplayedRun] = field(default_factory=dict)  # those of them that are under way
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
            try:
                yield from self._read_sub_agent(body) if entry.is_from_sub_agent else self._read_event(body)
            except (ValueError, TypeError, AttributeError) as error:  # an entry may be anybody's
                logger.warning("agx: an entry of a session can't be replayed (%s)", type(error).__name__)
        elif kind == "resume" and origin == RUNTIME:
            yield from self._resume(body)

    def check_end(self) -> None:
        """Raise RunFailedError where the entries stop before the run's end."""
        if self.begun and not self.ended:
            raise RunFailedError(RUN_LOST.sentence, code=RUN_LOST.code)

    def _end(self, body: Body) -> Iterator[Event]:
        self.ended = True
        outcome = body.get("outcome", "completed")  # a session opened by hand has none
        yield from self._end_sub_agents(reversed(list(self._open)), {"outcome": outcome})
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

    def _read_sub_agent(self, body: Body) -> Iterator[AgentStreamEvent]:
        source = SubAgentEvent(
            run=str(body.get("run")),
            parent_run=str(body.get("parent_run")),
            agent=str(body.get("agent")),
            parent_tool_call_id=str(body.get("parent_tool_call_id")),
            depth=int(body.get("depth", 1)),
        )
        if body.get("event") == "run-end":
            yield from self._end_sub_agents([source.run], {name: body[name] for name in _END_FIELDS if name in body})
            return
        if source.run not in self._sub_agents:
            self._sub_agents[source.run], self._open[source.run] = source, ReplayedRun()
            yield source
        for event in self._open.setdefault(source.run, ReplayedRun())._read_event(body):
            yield replace(source, event=event)

    def _end_sub_agents(self, runs: Iterable[str], end: Body) -> Iterator[AgentStreamEvent]:
        for run in runs:
            if (source := self._sub_agents.get(run)) is None:
                continue
            for event in self._open.pop(run, ReplayedRun())._end_response():
                yield replace(source, event=event)
            yield replace(source, end=end)

    def _resume(self, body: Body) -> Iterator[AgentStreamEvent]:
        """End what a dead process had begun; its calls were not made."""
        yield from self._close_part(None)
        void_calls = list(self._calls)
        for call_id in void_calls:
            self._made.pop(call_id, None)
            self._finals.pop(call_id, None)
        self._calls.clear()
        self._previous = None
        yield from self._end_sub_agents(reversed(void_runs(body)), {"outcome": "lost", "void": True})
        if body.get("void") is not None:
            void = {"attempt": body.get("attempt"), "void": body.get("void"), "tool_call_ids": void_calls}
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
        part = load_part(body)
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
        part = load_return(body)
        for calls in self._left.values():
            calls.pop(part.tool_call_id, None)  # it was decided on within the run
        return OutputToolResultEvent(part) if part.tool_call_id in self._finals else FunctionToolResultEvent(part)


def merge_deltas(events: Iterable[Event]) -> Iterator[Event]:
    """Yield events that were read together, deltas of one part merged: a front end's adapter is slow per event."""
    for part, group in groupby(events, _delta_part):
        if part is None:
            yield from group
            continue
        index, kind = part
        text = "".join([event.delta.content_delta or "" for event in cast("Iterable[Any]", group)])
        yield PartDeltaEvent(index=index, delta=kind(content_delta=text))


def _delta_part(event: Event) -> tuple[int, type[TextPartDelta | ThinkingPartDelta]] | None:
    # Deltas of `_add_delta()` have only a text, so nothing is lost.
    if isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta | ThinkingPartDelta):
        return event.index, type(event.delta)
    return None
