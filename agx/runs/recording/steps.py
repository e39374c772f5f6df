"""The steps of a run while they are under way, nodes and tool calls, and the fact that each becomes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from ...facts.schema import (
    NodeEnded,
    NodeKind,
    Outcome,
    ToolEnded,
    ToolOutcome,
    Trace,
)
from ...model_calls.model_request import ModelRequest
from ...telemetry import conventions as names
from ...telemetry.tracing import close_span
from ..outcome import describe_message, describe_type
from .run_facts import RunFields


@dataclass(slots=True)
class Node:
    """A node of the agent's graph."""

    kind: NodeKind
    name: str  # within the run, as in the ids of its fact and its span
    idx: int
    place: Trace
    span: Span | None  # where the service has an SDK
    start_ns: int = field(default_factory=time.time_ns)
    request: ModelRequest | None = None

    def close(self, outcome: Outcome, error: BaseException | None) -> None:
        """End the node's span."""
        if self.span is not None:
            failed = error if outcome == "failed" else None
            attributes = {names.NODE_OUTCOME: outcome}
            close_span(self.span, outcome, describe_type(failed), describe_message(failed), attributes=attributes)

    def to_fact(self, run: RunFields, outcome: Outcome, error: BaseException | None) -> NodeEnded:
        """Return the node's fact."""
        failed = error if outcome == "failed" else None
        call, failed_attempts = (None, ()) if self.request is None else self.request.describe(outcome, error)
        return NodeEnded(
            **run,
            node=self.kind,
            idx=self.idx,
            outcome=outcome,
            start_ns=self.start_ns,
            end_ns=time.time_ns(),
            error_type=describe_type(failed),
            error_message=describe_message(failed),
            model=call,
            failed_attempts=failed_attempts,
        )


@dataclass(slots=True)
class Tool:
    """A tool call."""

    tool: str
    call_id: str
    name: str  # within the run, as in the ids of its fact and its span
    idx: int
    place: Trace
    known: bool = True  # whether the agent has it; a model may invent a name
    start_ns: int = field(default_factory=time.time_ns)

    def to_fact(self, run: RunFields, outcome: ToolOutcome, error: BaseException | None) -> ToolEnded:
        """Return the tool call's fact."""
        failed = error if outcome == "error" else None
        return ToolEnded(
            **run,
            tool=self.tool,
            known=self.known,
            call_id=self.call_id,
            idx=self.idx,
            outcome=outcome,
            start_ns=self.start_ns,
            end_ns=time.time_ns(),
            error_type=describe_type(failed),
            error_message=describe_message(failed),
        )
