"""The recorder: turns what happens in one run into events, facts and spans. Synchronous: it never waits for Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic_ai.messages import (
    DeferredToolRequestsEvent,
    EnqueuedMessagesEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
)

from ...checkpoints.journal import Journal
from ...errors import AttemptsExhaustedError
from ...facts import schema as facts
from ...model_calls.model_request import ModelRequest
from ...recovery.recorded_run import Place, RecordedRun
from ...stream.entry import DEFERRED, RUNTIME, Body
from ...stream.events import delta_text
from ...telemetry import conventions as names
from ...telemetry.tracing import RunSpan
from ..outcome import Ending, log_failure, make_error_body
from ..state import RunState
from .run_events import RunEvents
from .run_facts import CommonFields, RunFacts
from .steered import SteeredMessages
from .steps import Node, Tool
from .tool_calls import ToolCalls

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from pydantic_ai.messages import ModelRequest as ModelRequestMessage
    from pydantic_ai.models import Model, ModelRequestContext

    from ...engine.engine import Engine
    from ...redis.keys import SessionKeys


class Recorder:
    """Records one run: events for its listeners, facts for operators, spans for traces.

    Without a session the run has no stream of its own: a sub-agent in a tool, or an agent without ids.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        run_id: str,
        agent: str,
        scope: str,
        session: SessionKeys | None,
        state: RunState,
        span: RunSpan,
        events: RunEvents,
        parent: Recorder | None,
        follows: str | None,
    ) -> None:
        self.engine = engine
        self.run_id = run_id
        self.agent = agent
        self.span = span
        self.session = session
        self.state = state
        self.stage: facts.NodeKind | None = None
        self.start_ns = self.end_ns = time.time_ns()
        self.called_ns = self.start_ns  # when `run()` was called, or the job was due
        self.stop: Callable[[], None] | None = None  # stops the agent, from outside; known once it runs
        self.messages: list[ModelMessage] = []  # the agent's own, which it goes on with
        self.scope = scope
        self.parent = parent
        self.follows = follows
        self._runtime = events.runtime
        self._node: Node | None = None
        self._model_calls = 0
        self.journal: Journal | None = None  # where another process can go on with the run
        self.on_request: Callable[[Sequence[ModelMessage]], None] = lambda messages: None  # about to be sent
        state.on_stop = self._on_stop
        common: CommonFields = {
            "scope": scope,
            "user": None if session is None else session.user,
            "session": None if session is None else session.session,
            "run_id": run_id,
            "parent_run_id": None if parent is None else parent.run_id,
            "agent": agent,
            "service": engine.service,
        }
        self.events = events
        self._facts = RunFacts(engine.queues, state, common)
        self.steered = SteeredMessages(self.events, self._facts, span.trace)
        self.tools = ToolCalls(agent, self._facts, span, events.runtime, ensure_node=self._ensure_node)

    # --- the run ---

    def emit_start(self, waited_ms: int | None = None) -> None:
        """Emit that the run began; its `begin`, if it has a stream, is acknowledged. `waited_ms`: in the jobs queue."""
        if self.events.writer is not None:
            self.events.sample.add(time.time_ns(), "begin", {})
        header = self._facts.describe("start", self.span.trace)
        waited_ns = None if waited_ms is None else waited_ms * 1_000_000
        started = facts.RunStarted(**header, start_ns=self.start_ns, follows=self.follows, waited_ns=waited_ns)
        self._facts.emit(started)
        if self.state.cancel_reason is not None:
            self._note_cancel()

    def continue_from(self, record: RecordedRun) -> None:
        """Go on with a run that another process began, as its stream shows it."""
        self.start_ns = record.first_ns
        self.called_ns = record.called_ns
        self.events.first_text_ns = record.first_text_at_ns
        self.events.sample = record.sample
        self._model_calls = len(record.requests)
        self.tools.continue_from(record.requests)
        self.events.earlier = record.totals

    def emit_resume(self, attempt: int, last_ns: int, before: Place | None) -> None:
        """Emit that this process goes on with the run; its `resume` is acknowledged. `before`: the attempt's before."""
        now = time.time_ns()
        self.events.sample.add(now, "resume", {})
        header = self._facts.describe(f"resume.{attempt}", self.span.trace)
        resumed = facts.RunResumed(**header, attempt=attempt, last_ns=last_ns, at_ns=now)
        if before is not None and before.trace.span_id != self.span.trace.span_id:
            resumed = replace(resumed, before=before.trace, before_start_ns=before.start_ns)
        self._facts.emit(resumed)
        if self.state.cancel_reason is not None:
            self._note_cancel()

    def _on_stop(self) -> None:
        """The run was cancelled or fenced: stop the agent mid-token, in a silent model, in an async tool."""
        if not self.state.fenced:
            self._note_cancel()
        if self.stop is not None:
            self.stop()

    def _note_cancel(self) -> None:
        if self.state.cancel_ms is not None:
            self.engine.clock.at_least(self.state.cancel_ms)
        self.note_stage()
        self.events.sample.add(time.time_ns(), "cancel", {"reason": self.state.cancel_reason})

    def note_stage(self) -> None:
        """Remember the node at the time of a cancel."""
        if self.stage is None and self._node is not None:
            self.stage = self._node.kind

    def finish(self, ending: Ending) -> None:
        """Close what is open and hand over the last events; synchronous, so nothing can interrupt it.

        Whatever one step raises is logged, and the next one follows: listeners always get their `end`.
        """
        self.end_ns = time.time_ns()
        if ending.outcome == "cancelled":
            self.note_stage()
        end: Body = {"run_id": self.run_id, "outcome": ending.outcome, "reason": ending.reason}
        for step in (
            self._note_partial,
            self.steered.deliver,
            self.tools.end_deferred,
            partial(self.end_node, ending.outcome, ending.error),
            partial(self._put_result, ending),
            partial(self.events.put, "end", RUNTIME, end, when="now"),
            partial(self._log_failure, ending),
        ):
            self.engine.supervisor.call(step, name="agx-recorder")
        self.state.end()

    def _put_result(self, ending: Ending) -> None:
        if ending.outcome == "completed" and not self._runtime.answered and self._runtime.idx >= 0:
            self.events.put_wire(self._runtime.answer())
        if (body := make_error_body(ending, self.engine.config.describe_error)) is not None:
            self.events.put("error", RUNTIME, body)

    def _log_failure(self, ending: Ending) -> None:
        # A sub-agent's failure is part of the traceback of the run that called it.
        if ending.outcome == "failed" and ending.error is not None and self.parent is None:
            session = None if self.session is None else self.session.path
            log_failure(ending.error, self.tools.last_error, run_id=self.run_id, session=session, agent=self.agent)

    def report(self, ending: Ending) -> asyncio.Future[None]:
        """End the run's span and emit its last fact; the future is done when the server has the fact.

        Only once `end` is acknowledged: until then a sidecar may finish the run, and its span would exist twice, with
        two endings.
        """
        self.span.end(
            ending.outcome,
            reason=ending.reason,
            error_type=ending.error_type,
            message=ending.message,
            end_ns=self.end_ns,
        )
        fact = facts.RunEnded(
            **self._facts.describe("end", self.span.trace),
            outcome=ending.outcome,
            reason=ending.reason,
            stage=self.stage if ending.outcome == "cancelled" else None,
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            error_type=ending.error_type,
            error_message=ending.message,
            cancel_ms=self.state.cancel_ms,
            end_ms=self.state.end_ms,
            model_calls=self._model_calls + self.tools.plain_requests,
            tool_calls=self.tools.count,
            plain_runs=self.tools.plain_runs,
            first_text_ns=None if (at_ns := self.events.first_text_ns) is None else max(0, at_ns - self.called_ns),
            stream=self.events.totals,
            events=() if self.session is None else self.events.sample.events,
            events_between=self.events.sample.between,
            follows=self.follows,
            attempts_exhausted=isinstance(ending.error, AttemptsExhaustedError),
        )
        # A sub-agent's fact waits for its parent's lease; the `end` of a run with a stream is its own confirmation.
        is_taken = self.engine.queues.put_acknowledged(fact, self.state if self.session is None else None)
        self.state.report()
        return is_taken

    # --- events ---

    def on_event(self, event: object) -> None:
        """Take an event of pydantic-ai's, live."""
        if isinstance(event, PartDeltaEvent):
            # The token path: nothing here that need not be.
            text = delta_text(event)
            if (node := self._node) is not None and node.request is not None:
                node.request.chunk(len(text or ""))
            if text:
                self.events.put_delta(event, text)
            return
        if isinstance(event, PartStartEvent):
            content = event.part.content if isinstance(event.part, (TextPart, ThinkingPart)) else ""
            if self._request is not None:
                self._request.chunk(len(content))
        elif isinstance(event, FunctionToolResultEvent):
            if self.journal is not None:
                self._take_result(event, self.journal)
                return
            self.tools.end_unrun(event.part)
        elif isinstance(event, EnqueuedMessagesEvent):
            self.steered.deliver()
        elif isinstance(event, DeferredToolRequestsEvent):
            self.events.put("info", DEFERRED, self.tools.defer_unrun(event.requests))
        if (wire := self._runtime.convert(event)) is not None:
            self.events.put_wire(wire)

    def _take_result(self, event: FunctionToolResultEvent, journal: Journal) -> None:
        """A tool call of a run that can be resumed has returned: recorded, unless an earlier attempt did that."""
        if journal.recorded_return(ToolCallPart(event.part.tool_name, tool_call_id=event.part.tool_call_id)) is None:
            self.tools.end_unrun(event.part)
            if (wire := self._runtime.convert(event)) is not None:
                self.events.put_wire(wire, journal.returned(event.part, event.content))

    # --- nodes ---

    @property
    def _request(self) -> ModelRequest | None:
        """The model request under way."""
        return None if self._node is None else self._node.request

    def begin_node(
        self, kind: facts.NodeKind, model: Model[Any] | None = None, request: ModelRequestMessage | None = None
    ) -> None:
        """A node begins, at whichever hook comes first; a node that is open already goes on."""
        if self._node is not None:
            if self._node.kind == kind:
                return
            self.end_node("completed", None)
        if kind == "model_request":
            checkpoint = None if self.journal is None or request is None else self.journal.request(request)
            self.events.put_wire(self._runtime.begin_node(model), checkpoint)
        # A resumed run begins with a second prompt node: the same one, whatever the index is by then.
        index = 0 if kind == "user_prompt" else self._runtime.index
        name = self._facts.add_name(facts.node_name(kind, index))
        place = self.span.child(name) if kind == "model_request" else self.span.trace
        attributes = {names.NODE_KIND: kind, names.NODE_INDEX: index}
        self._node = Node(kind, name, index, place, self.span.start_node(kind, attributes))

    def end_node(self, outcome: facts.Outcome, error: BaseException | None) -> None:
        """The open node, if any, ends."""
        node, self._node = self._node, None
        if node is None:
            return
        if node.kind == "model_request":
            journal = self.journal if outcome == "completed" else None
            self.events.put_wire(self._runtime.end_node(), None if journal is None else journal.response())
        fact = node.to_fact(self._facts.describe(node.name, node.place), outcome, error)
        self._model_calls += (fact.model is not None) + len(fact.failed_attempts)
        if not self.state.fenced:
            node.close(outcome, error)
            self._facts.emit(fact)

    def fail_node(self, error: Exception) -> None:
        """The open node ends with an error, or was stopped by a cancel."""
        self._note_partial()
        self.note_stage()
        self.end_node("failed" if self.state.cancel_reason is None else "cancelled", error)

    def begin_model(self, request: ModelRequestContext) -> Context | None:
        """A model request leaves; returns the context for it."""
        self.begin_node("model_request", request.model)
        assert self._node is not None
        self._node.request = ModelRequest(request)
        self.on_request(request.messages)
        return self.node_context()

    def node_context(self) -> Context | None:
        """Return the context in which the open node's work runs."""
        if self._node is None:
            return None
        if self._node.span is not None:
            return self.span.node_context(self._node.span)
        return self.span.child_context(self._node.place)

    def end_model(self, response: ModelResponse) -> None:
        """The model has answered."""
        if (request := self._request) is None:
            return
        request.complete(response)
        if not request.stream:
            for event in self._runtime.convert_response(response):
                self.events.put_wire(event)

    def _note_partial(self) -> None:
        """Take the partial answer of a request that was cut off: it may know its usage."""
        request, last = self._request, self.messages[-1] if self.messages else None
        if request is not None and request.response is None and isinstance(last, ModelResponse):
            request.response = last if last.state != "complete" else None

    def tool_context(self, tool: Tool) -> Context | None:
        """Return the context in which a tool runs; with an SDK its node's, in which upstream opens `execute_tool`."""
        if self.span.span is not None:
            return self.node_context()
        return self.span.child_context(tool.place)

    def _ensure_node(self) -> None:
        if self._node is None:
            self.begin_node("call_tools")
