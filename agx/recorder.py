"""The recorder: what happens in one run becomes its events, facts and spans. Synchronous, it never waits for Redis."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from opentelemetry import trace as otel
from opentelemetry.trace import Span
from pydantic_ai.messages import (
    DeferredToolRequestsEvent,
    FunctionToolResultEvent,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    ToolCallPart,
)

from . import conventions as names
from .events import AGENT, RUNTIME, Body, Runtime, WireEvent, delta_text, tool_outcome
from .facts import (
    NodeEnded,
    NodeKind,
    Outcome,
    Reason,
    RunEnded,
    RunStarted,
    Service,
    StreamEvent,
    ToolEnded,
    ToolOutcome,
    Trace,
    node_name,
    tool_name,
)
from .modelcall import ModelRequest
from .tracing import RunSpan, captures_content, close_span

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from pydantic_ai.models import Model, ModelRequestContext

    from .engine import Engine
    from .keys import SessionKeys
    from .writer import SessionWriter

MIRRORED = 64  # events at each end of a run that its `agx.stream` span keeps


class _Header(TypedDict):
    id: str
    scope: str
    user: str | None
    session: str | None
    run_id: str
    parent_run_id: str | None
    agent: str
    service: Service
    trace: Trace


@dataclass(slots=True)
class _Node:
    kind: NodeKind
    name: str
    place: Trace
    span: Span | None
    start_ns: int = field(default_factory=time.time_ns)
    request: ModelRequest | None = None


@dataclass(slots=True)
class Tool:
    """A tool call under way."""

    name: str
    call_id: str
    idx: int
    fact: str  # its name within the run
    place: Trace
    start_ns: int = field(default_factory=time.time_ns)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    outcome: Outcome
    reason: Reason | None = None
    error: BaseException | None = None

    @property
    def error_type(self) -> str | None:
        return None if self.error is None else describe_error(self.error)


def describe_error(error: BaseException) -> str:
    """Return an exception's type as `error.type` says it."""
    kind = type(error)
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


class Recorder:
    """One run, told to its listeners (events), to operators (facts) and to traces (spans).

    Without a writer it is observed, not streamed: a sub-agent in a tool, or an agent without ids.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        run_id: str,
        agent: str,
        scope: str,
        session: SessionKeys | None,
        span: RunSpan,
        runtime: Runtime,
        parent: Recorder | None,
        follows: str | None,
    ) -> None:
        self.engine = engine
        self.run_id = run_id
        self.agent = agent
        self.span = span
        self.session = session
        self.writer: SessionWriter | None = None
        self.fenced = False
        self.finished = False
        self.cancel_reason: Reason | None = None
        self.cancel_ms: int | None = None
        self.stage: NodeKind | None = None
        self.start_ns = time.time_ns()
        self.stop: Callable[[], None] | None = None  # stops the agent, from outside; known once it runs
        self.scope = scope
        self.parent = parent
        self._follows = follows
        self._runtime = runtime
        self._node: _Node | None = None
        self._names: set[str] = set()  # of nodes and tools, told or under way
        self._model_calls = 0
        self._tool_calls = 0
        self._head: list[StreamEvent] = []
        self._tail: deque[StreamEvent] = deque(maxlen=MIRRORED)
        self._mirrored = 0

    # --- the run ---

    def begin_body(self, session_id: str) -> Body:
        """Return the body of the run's `begin`."""
        return {
            "session_id": session_id,
            "run_id": self.run_id,
            "traceparent": self.span.traceparent,
            "agent": self.agent,
            "follows": self._follows,
            # What a sidecar has to know to finish a run whose process died (contract, section 5).
            "service": self.engine.service.name,
            "sdk": self.span.trace.sdk,
            "parent_span_id": self.span.trace.parent_span_id,
            "retention": self.engine.config.retention,
        }

    def started(self) -> None:
        """Tell operators that the run began; its `begin`, if it has a stream, is appended."""
        if self.writer is not None:
            self._mirror("begin", {})
        self.engine.queues.put(
            RunStarted(
                **self._header(f"{self.run_id}:start", self.span.trace), start_ns=self.start_ns, follows=self._follows
            )
        )

    def cancel(self, reason: Reason, mark_ms: int | None) -> None:
        """Stop the run: mid-token, in a silent model, in an async tool. The first reason holds."""
        if self.cancel_reason is not None:
            return
        self.cancel_reason, self.cancel_ms = reason, mark_ms
        self.note_stage()
        self._mirror("cancel", {"reason": reason})
        if self.stop is not None:
            self.stop()

    def lose(self) -> None:
        """Stop a run that another one has replaced; it writes nothing any more."""
        self.fenced = True
        if self.stop is not None:
            self.stop()

    def note_stage(self) -> None:
        """Remember the node at the time of a cancel."""
        if self.stage is None and self._node is not None:
            self.stage = self._node.kind

    def finish(self, ending: Ending) -> None:
        """Close what is open and hand over the last events; synchronous, so nothing can interrupt it."""
        self.finished = True
        if ending.outcome == "cancelled":
            self.note_stage()
        self.end_node(ending.outcome, ending.error)
        if ending.outcome == "completed" and not self._runtime.answered and self._runtime.idx >= 0:
            self._put(self._runtime.answer())
        if ending.outcome == "cancelled":
            self.put("error", RUNTIME, {"msg": "canceled"})
        elif ending.error is not None:
            self.put("error", RUNTIME, {"msg": f"crashed - {ending.error}", "error_type": ending.error_type})
        end: Body = {"run_id": self.run_id, "outcome": ending.outcome, "reason": ending.reason}
        self.put("end", RUNTIME, end, urgent=True)
        if self.fenced:
            return  # the spans of a finished run were told by whoever finished it
        message = str(ending.error) if ending.error is not None and captures_content() else None
        self.span.end(ending.outcome, reason=ending.reason, error_type=ending.error_type, message=message)

    def tell_end(self, ending: Ending) -> asyncio.Future[None]:
        """Tell operators how the run ended, once its `end` is acknowledged; done when the server has it."""
        mirrored = (*self._head, *self._tail)
        content = captures_content()
        return self.engine.queues.put_acknowledged(
            RunEnded(
                **self._header(f"{self.run_id}:end", self.span.trace),
                outcome=ending.outcome,
                reason=ending.reason,
                stage=self.stage if ending.outcome == "cancelled" else None,
                start_ns=self.start_ns,
                end_ns=time.time_ns(),
                error_type=ending.error_type,
                error_message=str(ending.error)[:1_000] if ending.error is not None and content else None,
                cancel_ms=self.cancel_ms,
                end_ms=None if self.writer is None else self.writer.end_ms,
                model_calls=self._model_calls,
                tool_calls=self._tool_calls,
                stream=None if self.writer is None else self.writer.totals,
                events=mirrored if self.writer is not None else (),
                events_between=self._mirrored - len(mirrored),
                follows=self._follows,
            )
        )

    # --- events ---

    def put(self, type: str, origin: str, body: Body, *, urgent: bool = False) -> None:
        """Append an event of this run, in its order."""
        if self.writer is None or self.fenced:
            return
        what = body.get("event", type) if type == "event" else type
        attributes: dict[str, str | int] = {}
        for name in (
            "idx",
            "part_kind",
            "tool_name",
            "tool_call_id",
            "tool_outcome",
            "outcome",
            "reason",
            "error_type",
        ):
            if isinstance(value := body.get(name), str | int):
                attributes[name] = value
        self._mirror("part" if what == "part_start" else what, attributes)
        self.writer.put(type, origin, body, urgent=urgent)

    def _put(self, event: WireEvent) -> None:
        self.put("event", AGENT, event.body, urgent=event.urgent)

    def _mirror(self, name: str, attributes: dict[str, str | int]) -> None:
        event = StreamEvent(time.time_ns(), name, attributes)
        self._mirrored += 1
        if len(self._head) < MIRRORED:
            self._head.append(event)
        else:
            self._tail.append(event)

    def on_event(self, event: object) -> None:
        """Take an event of pydantic-ai's, live."""
        if isinstance(event, PartDeltaEvent):
            # The token path: nothing here that need not be.
            text = delta_text(event)
            if self._node is not None and (request := self._node.request) is not None:
                request.chunk()
                request.chars += len(text or "")
            if text and self.writer is not None:
                self.writer.put_delta(AGENT, self._runtime.part_of(event), text)
            return
        if isinstance(event, PartStartEvent):
            self._chunk()
        elif isinstance(event, FunctionToolResultEvent):
            self._refused(event)
        elif isinstance(event, DeferredToolRequestsEvent):
            for call in (*event.requests.calls, *event.requests.approvals):
                self._told_without_running(call, "deferred")
        if (wire := self._runtime.convert(event)) is not None:
            self._put(wire)

    def _chunk(self) -> None:
        if self._node is not None and self._node.request is not None:
            self._node.request.chunk()

    # --- nodes ---

    def _name(self, name: str) -> str:
        """Make a node's or tool's name unique: a model may give two calls one id."""
        while name in self._names:
            name += "+"
        self._names.add(name)
        return name

    def begin_node(self, kind: NodeKind, model: Model[Any] | None = None) -> None:
        """A node begins, told by whichever hook comes first; a node that is open already just goes on."""
        if self._node is not None:
            if self._node.kind == kind:
                return
            self.end_node("completed", None)
        if kind == "model_request":
            self._put(self._runtime.begin_node(model))
        name = self._name(node_name(kind, max(self._runtime.idx, 0)))
        place = self.span.child(name) if kind == "model_request" else self.span.trace
        attributes = {names.NODE_KIND: kind, names.NODE_INDEX: max(self._runtime.idx, 0)}
        self._node = _Node(kind, name, place, self.span.start_node(kind, attributes))

    def end_node(self, outcome: Outcome, error: BaseException | None) -> None:
        """The open node, if any, ends."""
        node, self._node = self._node, None
        if node is None:
            return
        if node.kind == "model_request":
            self._put(self._runtime.end_node())
        error_type = describe_error(error) if error is not None and outcome == "failed" else None
        message = str(error)[:1_000] if error is not None and error_type is not None and captures_content() else None
        if node.span is not None:
            node.span.set_attribute(names.NODE_OUTCOME, outcome)
            close_span(node.span, outcome, error_type, message)
        if node.request is not None:
            self._model_calls += 1
        self.engine.queues.put(
            NodeEnded(
                **self._header(f"{self.run_id}:{node.name}", node.place),
                node=node.kind,
                idx=max(self._runtime.idx, 0),
                outcome=outcome,
                start_ns=node.start_ns,
                end_ns=time.time_ns(),
                error_type=error_type,
                error_message=message,
                model=None if node.request is None else node.request.describe(completed=outcome == "completed"),
            )
        )

    def begin_model(self, request: ModelRequestContext) -> Context | None:
        """A model request leaves; returns the context for it."""
        self.begin_node("model_request", request.model)
        assert self._node is not None
        self._node.request = ModelRequest(request.model, request.streaming)
        return self.node_context()

    def node_context(self) -> Context | None:
        """Return the context in which the open node's work runs."""
        if self._node is None:
            return None
        if self._node.span is not None:
            return otel.set_span_in_context(self._node.span)
        return self.span.child_context(self._node.place)

    def end_model(self, response: ModelResponse) -> None:
        """The model has answered."""
        if self._node is None or self._node.request is None:
            return
        self._node.request.answered(response)
        if not self._node.request.stream:
            for event in self._runtime.convert_response(response):
                self._put(event)

    def note_partial(self, response: ModelResponse) -> None:
        """Take the partial answer of a request that was cut off: it may know its usage."""
        if self._node is not None and self._node.request is not None and self._node.request.response is None:
            self._node.request.response = response

    # --- tools ---

    def begin_tool(self, call: ToolCallPart) -> Tool:
        """A tool is run."""
        idx = max(self._runtime.idx, 0)
        name = self._name(tool_name(idx, call.tool_call_id))
        return Tool(call.tool_name, call.tool_call_id, idx, name, self.span.child(name))

    def tool_context(self, tool: Tool) -> Context | None:
        """Return the context in which a tool runs; with an SDK its node's, in which upstream opens `execute_tool`."""
        if self.span.span is not None:
            return self.node_context()
        return self.span.child_context(tool.place)

    def end_tool(self, tool: Tool, outcome: ToolOutcome, error: BaseException | None = None) -> None:
        """A tool call is over, however it ended."""
        self._tool_calls += 1
        error_type = describe_error(error) if error is not None and outcome == "error" else None
        self.engine.queues.put(
            ToolEnded(
                **self._header(f"{self.run_id}:{tool.fact}", tool.place),
                tool=tool.name,
                call_id=tool.call_id,
                idx=tool.idx,
                outcome=outcome,
                start_ns=tool.start_ns,
                end_ns=time.time_ns(),
                error_type=error_type,
                error_message=str(error)[:1_000] if error_type is not None and captures_content() else None,
            )
        )

    def _refused(self, event: FunctionToolResultEvent) -> None:
        part = event.part
        self._told_without_running(ToolCallPart(part.tool_name, tool_call_id=part.tool_call_id), tool_outcome(part))

    def _told_without_running(self, call: ToolCallPart, outcome: ToolOutcome) -> None:
        if tool_name(max(self._runtime.idx, 0), call.tool_call_id) not in self._names:
            self.end_tool(self.begin_tool(call), outcome)

    def _header(self, fact_id: str, place: Trace) -> _Header:
        session = self.session
        return {
            "id": fact_id,
            "scope": self.scope,
            "user": None if session is None else session.user,
            "session": None if session is None else session.session,
            "run_id": self.run_id,
            "parent_run_id": None if self.parent is None else self.parent.run_id,
            "agent": self.agent,
            "service": self.engine.service,
            "trace": place,
        }
