"""The tool calls of one run: which are under way or deferred, and the fact of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic_ai.messages import BaseToolReturnPart, ModelMessage, ToolCallPart
from pydantic_ai.tool_manager import ToolManager
from pydantic_ai.tools import DeferredToolRequests

from ...facts.schema import NodeEnded, ToolOutcome, tool_name
from ...model_calls.plain_runs import describe_requests, find_run_id, report_plain_run
from ...recovery.recorded_requests import RecordedRequest
from ...stream.entry import Body
from ...stream.events import Runtime, tool_outcome
from ...telemetry.tracing import RunSpan
from .run_facts import RunFacts, RunFields
from .steps import Tool


class ToolCalls:
    """Counts the tool calls of a run and emits a fact when one has ended.

    Args:
        ensure_node: begins the node that runs tools where no node is open.
    """

    def __init__(
        self,
        agent: str,
        facts: RunFacts,
        span: RunSpan,
        runtime: Runtime,
        *,
        ensure_node: Callable[[], None],
    ) -> None:
        self.count = 0
        self.last_error: tuple[BaseException, str] | None = None  # and the tool that raised it
        self.manager: ToolManager[Any] | None = None  # has the agent's tools, as of the present step
        # Of sub-agents with our capability, by pydantic-ai's run id: what cancels it; None once it has ended.
        self.observed_runs: dict[str | None, Callable[[], None] | None] = {}
        self.plain_runs = 0  # of sub-agents without our capability
        self.plain_requests = 0  # their model requests
        self._agent = agent
        self._facts = facts
        self._span = span
        self._runtime = runtime
        self._ensure_node = ensure_node
        self._deferred: dict[str, Tool] = {}  # by call id: a handler may still resolve them within the run

    def continue_from(self, requests: Sequence[RecordedRequest]) -> None:
        """Take the calls of earlier attempts, whose facts exist; one that is made again is a call of its own."""
        for request in requests:
            for call_id in request.begun_calls:
                self._facts.add_name(tool_name(request.idx, call_id))
                self.count += 1

    def begin(self, call: ToolCallPart) -> Tool:
        """A tool runs; one that was deferred goes on as the same call."""
        self._ensure_node()  # where the caller streams the node, its tools come before the node's own hook
        call_id = str(call.tool_call_id)  # some providers send a number
        if (deferred := self._deferred.pop(call_id, None)) is not None:
            deferred.start_ns = time.time_ns()
            return deferred
        index = self._runtime.index
        name = self._facts.add_name(tool_name(index, call_id))
        return Tool(call.tool_name, call_id, name, index, self._span.child(name), self._is_known(call.tool_name))

    def _is_known(self, name: str) -> bool:
        # Before the first request of a run that resumes, the tools are not known yet: then all count as known.
        manager = self.manager
        return manager is None or manager.tools is None or manager.get_tool_def(name) is not None

    def metadata_of(self, name: str) -> dict[str, Any]:
        """Return the metadata of a tool, as its definition has it."""
        found = None if self.manager is None or self.manager.tools is None else self.manager.get_tool_def(name)
        return {} if found is None else found.metadata or {}

    def end(self, tool: Tool, outcome: ToolOutcome, error: BaseException | None = None) -> None:
        """A tool call is over, however it ended."""
        self._deferred.pop(tool.call_id, None)
        self.count += 1
        if error is not None:
            self.last_error = (error, tool.tool)
        self._facts.emit(tool.to_fact(self._facts.describe(tool.name, tool.place), outcome, error))

    def defer(self, tool: Tool) -> None:
        """A tool call waits for a decision or a result; it counts when it is resolved, or as deferred with its run."""
        self._deferred[tool.call_id] = tool

    def defer_unrun(self, requests: DeferredToolRequests) -> Body:
        """Calls wait, some of which were not run: return the names by id, by what they need, for listeners."""
        left = {"approvals": requests.approvals, "calls": requests.calls}
        for call in (*requests.calls, *requests.approvals):
            if not self._has_begun(call):
                self.defer(self.begin(call))
        return {kind: {call.tool_call_id: call.tool_name for call in calls} for kind, calls in left.items()}

    def describe_decision(self, call_id: str) -> RunFields:
        """Return what the fact of the decision on a call has of this run."""
        name = tool_name(self._runtime.index, call_id)
        return self._facts.describe(f"decision.{name}", self._span.trace)

    def end_unrun(self, part: BaseToolReturnPart) -> None:
        """A call has a result: of a tool that ran, that was refused, or that was resolved elsewhere."""
        outcome = tool_outcome(part)
        if (deferred := self._deferred.get(str(part.tool_call_id))) is not None:
            self.end(deferred, outcome)
        elif outcome != "ok":
            call = ToolCallPart(part.tool_name, tool_call_id=part.tool_call_id)
            if not self._has_begun(call):
                self.end(self.begin(call), outcome)
        # Else it ran and has ended, or it did not run: the final result was there before it (`end_strategy="early"`),
        # or it was deferred in an earlier run, where it was counted.

    def end_deferred(self) -> None:
        """The run ends: the calls that still wait count as deferred."""
        for tool in tuple(self._deferred.values()):
            self.end(tool, "deferred")

    def add_plain_run(self, tool: Tool, messages: Sequence[ModelMessage]) -> None:
        """Count the model requests of an agent that a tool ran plainly; they hang under the tool."""
        run_id = find_run_id(messages)
        if run_id is None or run_id in self.observed_runs:
            return
        self.plain_runs += 1
        report_plain_run(self._agent, tool.tool)
        for call in describe_requests(messages, run_id, time.time_ns()):
            name = self._facts.add_name(f"{tool.name}.plain")
            place = replace(self._span.child(name), parent_span_id=tool.place.span_id)
            self.plain_requests += 1
            self._facts.emit(
                NodeEnded(
                    **self._facts.describe(name, place),
                    node="model_request",
                    idx=tool.idx,
                    outcome="completed",
                    start_ns=call.start_ns,
                    end_ns=call.end_ns,
                    model=call,
                )
            )

    def _has_begun(self, call: ToolCallPart) -> bool:
        return tool_name(self._runtime.index, str(call.tool_call_id)) in self._facts
