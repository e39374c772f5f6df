"""The recorder: turns what happens in one run into events, facts and spans. Synchronous: it never waits for Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic_ai.messages import (
    BaseToolReturnPart,
    DeferredToolRequestsEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
)

from ..checkpoints.journal import Journal
from ..facts import schema as facts
from ..facts.event_sample import EventSample
from ..model_calls.model_request import ModelRequest
from ..model_calls.plain_runs import describe_requests, find_run_id, report_plain_run
from ..recovery.recorded_run import RecordedRun
from ..redis.retry import COMMAND_TIMEOUT
from ..stream.entry import AGENT, DEFERRED, RUNTIME
from ..stream.events import Body, Runtime, WireEvent, delta_text, tool_outcome
from ..telemetry import conventions as names
from ..telemetry.tracing import RunSpan
from .outcome import Ending, log_failure, make_error_body
from .state import RunState
from .steps import Node, RunFields, Tool

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from pydantic_ai.messages import ModelRequest as ModelRequestMessage
    from pydantic_ai.models import Model, ModelRequestContext

    from ..engine.engine import Engine
    from ..redis.keys import SessionKeys
    from ..stream.writer import SessionWriter


class Recorder:
    """Records one run: events for its listeners, facts for operators, spans for traces.

    Without a writer the run is observed, not streamed: a sub-agent in a tool, or an agent without ids.
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
        self.state = state
        self.stage: facts.NodeKind | None = None
        self.start_ns = self.end_ns = time.time_ns()
        self.stop: Callable[[], None] | None = None  # stops the agent, from outside; known once it runs
        self.messages: list[ModelMessage] = []  # the agent's own, which it goes on with
        self.scope = scope
        self.parent = parent
        self.follows = follows
        self._runtime = runtime
        self._node: Node | None = None
        self._names: set[str] = set()  # of nodes and tools, emitted or under way
        self._model_calls = 0
        self._tool_calls = 0
        self._tool_error: tuple[BaseException, str] | None = None  # the last one, and the tool that raised it
        self._sample = EventSample()
        self.observed_runs: set[str | None] = set()  # of sub-agents with our capability, by pydantic-ai's ids
        self._plain_runs = 0
        self._written = facts.StreamTotals()  # by earlier attempts
        self._deferred: dict[str, Tool] = {}  # by call id: a handler may still resolve them within the run
        self.journal: Journal | None = None  # where another process can go on with the run
        self.knows_tool: Callable[[str], bool] = lambda name: True  # whether the agent has a tool of this name
        state.on_stop = self._on_stop

    # --- the run ---

    def emit_start(self) -> None:
        """Emit that the run began; its `begin`, if it has a stream, is acknowledged."""
        if self.writer is not None:
            self._sample.add(time.time_ns(), "begin", {})
        header = self._describe("start", self.span.trace)
        self._emit(facts.RunStarted(**header, start_ns=self.start_ns, follows=self.follows))
        if self.state.cancel_reason is not None:
            self._note_cancel()

    def continue_from(self, record: RecordedRun) -> None:
        """Go on with a run that another process began, as its stream shows it."""
        self.start_ns = record.first_ns
        self._sample = record.sample
        self._model_calls = len(record.requests)
        self._tool_calls = sum(len(request.returns) for request in record.requests)
        self._written = record.totals

    def emit_resume(self, attempt: int, last_ns: int) -> None:
        """Emit that this process goes on with the run; its `resume` is acknowledged."""
        now = time.time_ns()
        self._sample.add(now, "resume", {})
        header = self._describe(f"resume.{attempt}", self.span.trace)
        self._emit(facts.RunResumed(**header, attempt=attempt, last_ns=last_ns, at_ns=now))
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
        self._sample.add(time.time_ns(), "cancel", {"reason": self.state.cancel_reason})

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
            self._end_deferred,
            partial(self.end_node, ending.outcome, ending.error),
            partial(self._put_result, ending),
            partial(self.put, "end", RUNTIME, end, urgent=True),
            partial(self._log_failure, ending),
        ):
            self.engine.supervisor.call(step, name="agx-recorder")
        self.state.end()

    def _end_deferred(self) -> None:
        for tool in tuple(self._deferred.values()):
            self.end_tool(tool, "deferred")

    def _put_result(self, ending: Ending) -> None:
        if ending.outcome == "completed" and not self._runtime.answered and self._runtime.idx >= 0:
            self._put(self._runtime.answer())
        if (body := make_error_body(ending, self.engine.config.describe_error)) is not None:
            self.put("error", RUNTIME, body)

    def _log_failure(self, ending: Ending) -> None:
        # A sub-agent's failure is part of the traceback of the run that called it.
        if ending.outcome == "failed" and ending.error is not None and self.parent is None:
            keys = self.session
            session = None if keys is None else f"{keys.scope}/{keys.user}/{keys.session}"
            log_failure(ending.error, self._tool_error, run_id=self.run_id, session=session, agent=self.agent)

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
            **self._describe("end", self.span.trace),
            outcome=ending.outcome,
            reason=ending.reason,
            stage=self.stage if ending.outcome == "cancelled" else None,
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            error_type=ending.error_type,
            error_message=ending.message,
            cancel_ms=self.state.cancel_ms,
            end_ms=self.state.end_ms,
            model_calls=self._model_calls,
            tool_calls=self._tool_calls,
            plain_runs=self._plain_runs,
            stream=None if self.writer is None else self._written + self.writer.totals,
            events=self._sample.events if self.writer is not None else (),
            events_between=self._sample.between,
            follows=self.follows,
        )
        # A sub-agent's fact waits for its parent's lease; the `end` of a run with a stream is its own confirmation.
        is_taken = self.engine.queues.put_acknowledged(fact, self.state if self.writer is None else None)
        self.state.report()
        return is_taken

    # --- events ---

    def put(self, type: str, origin: str, body: Body, *, urgent: bool = False, checkpoint: bytes | None = None) -> None:
        """Append an event of this run, in its order."""
        if self.writer is None or self.state.fenced:
            return
        self._sample.add(time.time_ns(), type, body)
        self.writer.put(type, origin, body, urgent=urgent, checkpoint=checkpoint)

    def _put(self, event: WireEvent, checkpoint: bytes | None = None) -> None:
        urgent = event.urgent or checkpoint is not None
        self.put("event", AGENT, event.body, urgent=urgent, checkpoint=checkpoint)

    def on_event(self, event: object) -> None:
        """Take an event of pydantic-ai's, live."""
        if isinstance(event, PartDeltaEvent):
            # The token path: nothing here that need not be.
            text = delta_text(event)
            if (request := self._request) is not None:
                request.chunk(len(text or ""))
            if text and self.writer is not None:
                self.writer.put_delta(AGENT, self._runtime.part_of(event), text)
            return
        if isinstance(event, PartStartEvent):
            content = event.part.content if isinstance(event.part, (TextPart, ThinkingPart)) else ""
            if self._request is not None:
                self._request.chunk(len(content))
        elif isinstance(event, FunctionToolResultEvent):
            if self.journal is not None:
                self._take_result(event, self.journal)
                return
            self._end_unrun(event.part)
        elif isinstance(event, DeferredToolRequestsEvent):
            left = {"approvals": event.requests.approvals, "calls": event.requests.calls}
            for call in (*left["calls"], *left["approvals"]):
                self._defer_unrun(call)
            self.put("info", DEFERRED, {kind: {c.tool_call_id: c.tool_name for c in left[kind]} for kind in left})
        if (wire := self._runtime.convert(event)) is not None:
            self._put(wire)

    async def wait_recorded(self) -> None:
        """Wait until the checkpoints so far are acknowledged; through an outage no longer than Redis has to answer."""
        if self.writer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    await self.writer.drain()

    def _take_result(self, event: FunctionToolResultEvent, journal: Journal) -> None:
        """A tool call of a run that can be resumed has returned: recorded, unless an earlier attempt did that."""
        if journal.recorded_return(ToolCallPart(event.part.tool_name, tool_call_id=event.part.tool_call_id)) is None:
            self._end_unrun(event.part)
            if (wire := self._runtime.convert(event)) is not None:
                self._put(wire, journal.returned(event.part, event.content))

    # --- nodes ---

    def _name(self, name: str) -> str:
        """Make a node's or tool's name unique: a model may give two calls one id."""
        while name in self._names:
            name += "+"
        self._names.add(name)
        return name

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
            self._put(self._runtime.begin_node(model), checkpoint)
        name = self._name(facts.node_name(kind, max(self._runtime.idx, 0)))
        place = self.span.child(name) if kind == "model_request" else self.span.trace
        attributes = {names.NODE_KIND: kind, names.NODE_INDEX: max(self._runtime.idx, 0)}
        self._node = Node(kind, name, max(self._runtime.idx, 0), place, self.span.start_node(kind, attributes))

    def end_node(self, outcome: facts.Outcome, error: BaseException | None) -> None:
        """The open node, if any, ends."""
        node, self._node = self._node, None
        if node is None:
            return
        if node.kind == "model_request":
            journal = self.journal if outcome == "completed" else None
            self._put(self._runtime.end_node(), None if journal is None else journal.response())
        fact = node.to_fact(self._describe(node.name, node.place), outcome, error)
        self._model_calls += (fact.model is not None) + len(fact.failed_attempts)
        if not self.state.fenced:
            node.close(outcome, error)
            self._emit(fact)

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
                self._put(event)

    def _note_partial(self) -> None:
        """Take the partial answer of a request that was cut off: it may know its usage."""
        request, last = self._request, self.messages[-1] if self.messages else None
        if request is not None and request.response is None and isinstance(last, ModelResponse):
            request.response = last if last.state != "complete" else None

    # --- tools ---

    def begin_tool(self, call: ToolCallPart) -> Tool:
        """A tool runs; one that was deferred goes on as the same call."""
        if self._node is None:
            # The caller streams the node: its tools come before the node's own hook.
            self.begin_node("call_tools")
        call_id = str(call.tool_call_id)  # some providers send a number
        if (deferred := self._deferred.pop(call_id, None)) is not None:
            deferred.start_ns = time.time_ns()
            return deferred
        idx = max(self._runtime.idx, 0)
        name = self._name(facts.tool_name(idx, call_id))
        return Tool(call.tool_name, call_id, name, idx, self.span.child(name), self.knows_tool(call.tool_name))

    def tool_context(self, tool: Tool) -> Context | None:
        """Return the context in which a tool runs; with an SDK its node's, in which upstream opens `execute_tool`."""
        if self.span.span is not None:
            return self.node_context()
        return self.span.child_context(tool.place)

    def end_tool(self, tool: Tool, outcome: facts.ToolOutcome, error: BaseException | None = None) -> None:
        """A tool call is over, however it ended."""
        self._deferred.pop(tool.call_id, None)
        self._tool_calls += 1
        if error is not None:
            self._tool_error = (error, tool.tool)
        self._emit(tool.to_fact(self._describe(tool.name, tool.place), outcome, error))

    def defer_tool(self, tool: Tool) -> None:
        """A tool call waits for a decision or a result; it counts when it is resolved, or as deferred with its run."""
        self._deferred[tool.call_id] = tool

    def add_plain_run(self, tool: Tool, messages: Sequence[ModelMessage]) -> None:
        """Count the model requests of an agent that a tool ran plainly; they hang under the tool."""
        run_id = find_run_id(messages)
        if run_id is None or run_id in self.observed_runs:
            return
        self._plain_runs += 1
        report_plain_run(self.agent, tool.tool)
        for call in describe_requests(messages, run_id, time.time_ns()):
            name = self._name(f"{tool.name}.plain")
            self._model_calls += 1
            self._emit(
                facts.NodeEnded(
                    **self._describe(name, replace(self.span.child(name), parent_span_id=tool.place.span_id)),
                    node="model_request",
                    idx=tool.idx,
                    outcome="completed",
                    start_ns=call.start_ns,
                    end_ns=call.end_ns,
                    model=call,
                )
            )

    def _end_unrun(self, part: BaseToolReturnPart) -> None:
        """A call has a result: of a tool that ran, that was refused, or that was resolved by somebody else."""
        outcome = tool_outcome(part)
        if (deferred := self._deferred.get(str(part.tool_call_id))) is not None:
            self.end_tool(deferred, outcome)
        elif outcome != "ok":
            self._end_without_running(ToolCallPart(part.tool_name, tool_call_id=part.tool_call_id), outcome)
        # Else it ran and has ended, or it did not run: the final result was there before it (`end_strategy="early"`),
        # or it was deferred in an earlier run, where it was counted.

    def _end_without_running(self, call: ToolCallPart, outcome: facts.ToolOutcome) -> None:
        if not self._has_begun(call):
            self.end_tool(self.begin_tool(call), outcome)

    def _defer_unrun(self, call: ToolCallPart) -> None:
        """A call waits that was not run: it needs an approval, or its tool is the caller's own."""
        if not self._has_begun(call):
            self.defer_tool(self.begin_tool(call))

    def _has_begun(self, call: ToolCallPart) -> bool:
        return facts.tool_name(max(self._runtime.idx, 0), str(call.tool_call_id)) in self._names

    def _emit(self, fact: facts.Fact) -> None:
        """Hand a fact over, unless another process emits how this run ended."""
        if not self.state.suppressed:
            self.engine.queues.put(fact, self.state)

    def _describe(self, name: str, place: facts.Trace) -> RunFields:
        session = self.session
        return {
            "id": f"{self.run_id}:{name}",
            "scope": self.scope,
            "user": None if session is None else session.user,
            "session": None if session is None else session.session,
            "run_id": self.run_id,
            "parent_run_id": None if self.parent is None else self.parent.run_id,
            "agent": self.agent,
            "service": self.engine.service,
            "trace": place,
        }
