"""Spans in the service's process, each exported exactly once (contract, section 5).

With an OpenTelemetry SDK the runtime starts real spans, `agx.run` and `agx.node`, and pydantic-ai nests its own inside.
Without one it makes the ids, keeps them current, so that tools send our `traceparent`, and the sidecar exports the
spans from the facts.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from opentelemetry import baggage
from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from ..facts.schema import ERROR_OUTCOMES, Outcome, Trace, span_id
from ..redis.keys import SessionKeys
from . import conventions as names

logger = logging.getLogger("agx")

_TRACER = "agx"


def captures_content() -> bool:
    """Return whether message content may leave in spans: only where the standard variable says so."""
    return os.environ.get(names.CAPTURE_CONTENT, "").strip().upper() in ("TRUE", "SPAN_ONLY", "SPAN_AND_EVENT")


@dataclass(slots=True)
class RunSpan:
    """A run's place in its trace: the fact sheet, the context to run in, and the span where an SDK records it."""

    run_id: str
    trace: Trace
    context: Context
    span: Span | None  # None without an SDK
    conversation_id: str | None = None  # None: the run has no session

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace.trace_id}-{self.trace.span_id}-{'01' if self.trace.sampled else '00'}"

    def end(
        self,
        outcome: Outcome,
        *,
        reason: str | None,
        error_type: str | None,
        message: str | None,
        end_ns: int,
    ) -> None:
        """End the run's span, where it is ours to end."""
        if self.span is not None:
            attributes = {names.RUN_OUTCOME: outcome} | ({} if reason is None else {names.RUN_REASON: reason})
            close_span(self.span, outcome, error_type, message, attributes=attributes, end_ns=end_ns)

    def child(self, what: str) -> Trace:
        """Return the place of a model request or a tool call in the trace of a service without an SDK."""
        run = self.trace
        return Trace(run.trace_id, span_id(self.run_id, what), run.span_id, run.sampled, run.sdk, run.trace_state)

    def child_context(self, child: Trace) -> Context | None:
        """Return the context in which a model or a tool works, or None where an SDK keeps its own."""
        return None if self.span is not None else _context_of(child, otel_context.get_current())

    def node_context(self, span: Span) -> Context:
        """Return the context of a node's work: upstream's spans take the conversation's id from the baggage there."""
        context = otel.set_span_in_context(span)
        if self.conversation_id is None:
            return context
        return baggage.set_baggage(names.CONVERSATION_ID, self.conversation_id, context)

    def start_node(self, kind: str, attributes: Attributes) -> Span | None:
        """Start the span of a node, under whatever is current: upstream's `invoke_agent`."""
        if self.span is None:
            return None
        if self.conversation_id is not None:
            otel.get_current_span().set_attribute(names.CONVERSATION_ID, self.conversation_id)
        return _start_span(f"agx.node {kind}", attributes)


def start_run(run_id: str, agent: str, *, attributes: Mapping[str, str], ratio: float, follows: str | None) -> RunSpan:
    """Determine whether this process or a sidecar exports the run's spans, and start the run's span.

    A span is started through the API: if its id is invalid, or its parent's, nobody records here. (Looking for the
    SDK's class misses Logfire; looking for a valid id is fooled by a remote parent.)
    """
    conversation_id = attributes.get(names.CONVERSATION_ID)
    parent = otel.get_current_span().get_span_context()
    links = [Link(followed)] if (followed := _parse_traceparent(follows)) is not None else None
    span = _start_span(f"agx.run {agent}", attributes, links) or INVALID_SPAN
    ours = span.get_span_context()
    has_sdk = ours.span_id != 0 and not (parent.is_valid and ours.span_id == parent.span_id)
    parent_span_id = f"{parent.span_id:016x}" if parent.is_valid else None
    if has_sdk:
        state = ours.trace_state.to_header() or None
        trace = Trace(
            f"{ours.trace_id:032x}", f"{ours.span_id:016x}", parent_span_id, ours.trace_flags.sampled, True, state
        )
        return RunSpan(run_id, trace, otel.set_span_in_context(span), span, conversation_id)
    if parent.is_valid:
        trace_id, sampled = parent.trace_id, parent.trace_flags.sampled
    else:
        trace_id = random.getrandbits(128) or 1
        # The SDK's TraceIdRatioBased looks at the same bits: services of one trace decide alike.
        sampled = (trace_id & 0xFFFF_FFFF_FFFF_FFFF) < ratio * 2**64
    state = parent.trace_state.to_header() or None if parent.is_valid else None
    trace = Trace(f"{trace_id:032x}", span_id(run_id, "run"), parent_span_id, sampled, False, state)
    return RunSpan(run_id, trace, _context_of(trace, otel_context.get_current()), None, conversation_id)


def describe_run(run_id: str, agent: str, scope: str, session: SessionKeys | None) -> dict[str, str]:
    """Return the attributes that a run's span has from its start."""
    attributes = {names.RUN_ID: run_id, names.SCOPE_ID: scope, names.AGENT_NAME: agent}
    if session is not None:
        attributes[names.SESSION_ID] = session.session
        attributes[names.CONVERSATION_ID] = names.conversation_id(scope, session.user, session.session)
    return attributes


def continue_run(
    run_id: str, agent: str, trace: Trace, *, attributes: Mapping[str, str], before: str | None
) -> RunSpan:
    """Return the place of a run that another process began; where an SDK listens here, with a span under the run's.

    Args:
        before: traceparent of the attempt before, to which that span is linked.
    """
    conversation_id = attributes.get(names.CONVERSATION_ID)
    context = _context_of(trace, Context())
    links = [Link(linked)] if (linked := _parse_traceparent(before)) is not None else None
    span = _start_span(f"agx.run {agent}", attributes, links, context) or INVALID_SPAN
    ours = span.get_span_context()
    if ours.span_id in (0, int(trace.span_id, 16)):
        trace = replace(trace, sdk=False)  # nobody here exports its spans, so the sidecar does
        return RunSpan(run_id, trace, _context_of(trace, otel_context.get_current()), None, conversation_id)
    place = Trace(
        trace.trace_id, f"{ours.span_id:016x}", trace.span_id, ours.trace_flags.sampled, True, trace.trace_state
    )
    return RunSpan(run_id, place, otel.set_span_in_context(span), span, conversation_id)


def close_span(
    span: Span,
    outcome: Outcome,
    error_type: str | None,
    message: str | None,
    *,
    attributes: Mapping[str, str],
    end_ns: int | None = None,
) -> None:
    """End a span with the status of its outcome: cancelled is not an error, success leaves the status unset."""
    try:
        for name, value in attributes.items():
            span.set_attribute(name, value)
        if outcome in ERROR_OUTCOMES:
            if error_type is not None:
                span.set_attribute(names.ERROR_TYPE, error_type)
            span.set_status(Status(StatusCode.ERROR, message))
        span.end(end_ns)
    except Exception as error:  # a span processor of the service's own may raise anything
        _report(error)


def _start_span(
    name: str, attributes: Attributes, links: list[Link] | None = None, context: Context | None = None
) -> Span | None:
    try:
        return otel.get_tracer(_TRACER).start_span(
            name, context=context, kind=SpanKind.INTERNAL, attributes=attributes, links=links
        )
    except Exception as error:  # as above
        _report(error)
        return None


def _report(error: Exception) -> None:
    logger.warning("agx: a span is lost, OpenTelemetry raised %s: check its span processors", type(error).__name__)


class Attached:
    """Makes a context current for a block of one coroutine; never across a `yield` of a generator.

    Six of them in a run: a class costs half of what a generator does.
    """

    __slots__ = ("_context", "_token")

    def __init__(self, context: Context | None) -> None:
        self._context = context

    def __enter__(self) -> None:
        if self._context is not None:
            self._token = otel_context.attach(self._context)

    def __exit__(self, *error: object) -> None:
        if self._context is not None:
            otel_context.detach(self._token)


def has_no_sdk() -> bool:
    """Return whether it is certain that no tracer provider was ever set (a hint, before a span can be started)."""
    return isinstance(otel.get_tracer_provider(), (otel.ProxyTracerProvider, otel.NoOpTracerProvider))


def _context_of(place: Trace, base: Context) -> Context:
    state = otel.TraceState.from_header([place.trace_state]) if place.trace_state else None
    context = SpanContext(
        int(place.trace_id, 16),
        int(place.span_id, 16),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if place.sampled else TraceFlags.DEFAULT),
        trace_state=state,
    )
    return otel.set_span_in_context(NonRecordingSpan(context), base)


def valid_traceparent(header: object) -> str | None:
    """Return a traceparent that a trace can be linked to; None for everything else."""
    return header if isinstance(header, str) and _parse_traceparent(header) is not None else None


def _parse_traceparent(header: str | None) -> SpanContext | None:
    if header is None:
        return None
    context = TraceContextTextMapPropagator().extract({"traceparent": header}, Context())
    found = otel.get_current_span(context).get_span_context()
    return found if found.is_valid else None
