"""Turns facts into spans with their given ids, times and the service's resource (contract, section 5).

Services with an SDK of their own export their spans themselves; for them only `agx.stream` is made here, and `agx.run`
where the process died. Of an unsampled trace nothing is exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from agx import __version__
from agx.facts.schema import (
    ERROR_OUTCOMES,
    Fact,
    ModelCall,
    NodeEnded,
    RunEnded,
    RunFact,
    RunFeedback,
    RunResumed,
    Service,
    ToolEnded,
    Trace,
    span_id,
    stream_span_id,
)
from agx.telemetry import conventions as c

Value = str | int | float | bool | Sequence[str]
Attributes = dict[str, Value]
Spanned = NodeEnded | ToolEnded | RunEnded | RunResumed | RunFeedback

MAX_NAME = 200  # characters of a span's name
MAX_TEXT = 4_096  # characters of an attribute
CUT = " [cut]"

_SCOPE = InstrumentationScope("agx", __version__)
_NOT_RUN = frozenset({"denied", "deferred"})  # nothing was executed, so there is no `execute_tool`
_ERRORS = frozenset({*ERROR_OUTCOMES, "error"})


class SampledSpan(ReadableSpan):
    """A span that had more events than it carries."""

    def __init__(self, name: str, *, left_out: int, **given: object) -> None:
        super().__init__(name, **given)  # type: ignore[arg-type]
        self._left_out = left_out

    @property
    def dropped_events(self) -> int:
        return self._left_out


def spans_of(fact: Fact, semconv: c.Semconv = "current") -> list[ReadableSpan]:
    """Return the spans that the sidecar exports for a fact; most facts of an SDK's service have none.

    Raises:
        ValueError: its trace or span ids are no hexadecimal numbers, or a number in it is beyond all measure.
    """
    if not isinstance(fact, Spanned) or not fact.trace.sampled:
        return []
    try:
        return _make_spans(fact, semconv)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def _make_spans(fact: Spanned, semconv: c.Semconv) -> list[ReadableSpan]:
    if isinstance(fact, RunEnded):
        return _run_spans(fact)
    if isinstance(fact, RunFeedback):
        return [_feedback_span(fact)]
    if isinstance(fact, RunResumed):
        return [] if fact.before is None else [_dead_attempt_span(fact, fact.before)]
    if fact.trace.sdk:
        return []
    if isinstance(fact, ToolEnded):
        return [] if fact.outcome in _NOT_RUN else [_tool_span(fact)]
    if fact.model is None:
        return []
    attempts = [_attempt_span(fact, number, attempt, semconv) for number, attempt in enumerate(fact.failed_attempts)]
    return [*attempts, _chat_span(fact, fact.model, semconv)]


def _run_spans(fact: RunEnded) -> list[ReadableSpan]:
    spans = []
    if not fact.trace.sdk:
        spans.append(_run_span(fact, f"{c.INVOKE_AGENT} {fact.agent}"))
    elif fact.partial:
        spans.append(_run_span(fact, f"agx.run {fact.agent}"))
    if fact.stream is not None and fact.session is not None:
        spans.append(_stream_span(fact))
    return spans


def _run_span(fact: RunEnded, name: str) -> ReadableSpan:
    attributes = _common(fact)
    attributes[c.OPERATION_NAME] = c.INVOKE_AGENT
    _add_outcome(attributes, fact)
    link = _link(fact.follows)
    return _span(fact, name, attributes, fact.start_ns, fact.end_ns, links=(link,) if link else ())


def _dead_attempt_span(fact: RunResumed, before: Trace) -> ReadableSpan:
    """Return the span of an attempt whose process died, or handed the run over, before it could end the span."""
    attributes = _common(fact)
    attributes |= {c.OPERATION_NAME: c.INVOKE_AGENT, c.ATTEMPT: str(fact.attempt - 1), c.TRACE_PARTIAL: True}
    return ReadableSpan(
        f"agx.run {fact.agent}"[:MAX_NAME],
        context=_context(before, before.span_id),
        parent=_context(before, before.parent_span_id) if before.parent_span_id else None,
        resource=_resource(fact.service),
        attributes=_all_cut(attributes),
        start_time=min(fact.before_start_ns, fact.last_ns),
        end_time=fact.last_ns,
        instrumentation_scope=_SCOPE,
    )


def _feedback_span(fact: RunFeedback) -> ReadableSpan:
    """Return the span of a score, without a length: the run's own span has been exported."""
    result: Attributes = {c.EVALUATION_NAME: fact.name, c.EVALUATION_SCORE: fact.value}
    result |= {} if fact.comment is None else {c.EVALUATION_EXPLANATION: fact.comment}
    attributes = _common(fact) | result | ({} if fact.by is None else {c.FEEDBACK_BY: fact.by})
    return ReadableSpan(
        f"evaluation {fact.name}"[:MAX_NAME],
        context=_context(fact.trace, fact.trace.span_id),
        parent=_context(fact.trace, fact.trace.parent_span_id) if fact.trace.parent_span_id else None,
        resource=_resource(fact.service),
        attributes=_all_cut(attributes),
        events=(Event(c.EVALUATION_RESULT, _all_cut(result), fact.at_ns),),
        start_time=fact.at_ns,
        end_time=fact.at_ns,
        instrumentation_scope=_SCOPE,
    )


def _stream_span(fact: RunEnded) -> ReadableSpan:
    attributes = _common(fact)
    if fact.events_between:
        attributes[c.DROPPED_EVENTS] = fact.events_between
    _add_outcome(attributes, fact)
    events = [Event(event.name[:MAX_NAME], _all_cut(event.attributes), event.at_ns) for event in fact.events]
    run = fact.trace
    return SampledSpan(
        "agx.stream",
        left_out=fact.events_between,
        context=_context(run, stream_span_id(fact.run_id)),
        parent=_context(run, run.span_id),
        resource=_resource(fact.service),
        attributes=_all_cut(attributes),
        events=events,
        status=_status(fact.outcome, fact.error_type, fact.error_message),
        start_time=fact.start_ns,
        end_time=fact.end_ns,
        instrumentation_scope=_SCOPE,
    )


def _chat_span(fact: NodeEnded, call: ModelCall, semconv: c.Semconv) -> ReadableSpan:
    attributes = _common(fact)
    attributes |= {
        c.OPERATION_NAME: c.CHAT,
        c.PROVIDER_NAME: call.provider,
        c.REQUEST_MODEL: call.request_model,
        c.NODE_KIND: fact.node,
        c.NODE_INDEX: fact.idx,
        c.NODE_OUTCOME: fact.outcome,
    }
    if call.stream:
        attributes[c.REQUEST_STREAM] = True
    if call.response_model:
        attributes[c.RESPONSE_MODEL] = call.response_model
    if call.response_id:
        attributes[c.RESPONSE_ID] = call.response_id
    if call.finish_reason:
        attributes[c.RESPONSE_FINISH_REASONS] = (_cut(call.finish_reason),)
    if call.finish_reason_missing:
        attributes[c.FINISH_REASON] = "missing"
    if call.first_chunk_ns is not None:
        attributes[c.RESPONSE_TIME_TO_FIRST_CHUNK] = call.first_chunk_ns / 1_000_000_000
    _add_usage(attributes, call, semconv)
    _add_error(attributes, fact.outcome, fact.error_type)
    name = f"{c.CHAT} {call.request_model}"
    return _span(fact, name, attributes, call.start_ns, call.end_ns, kind=SpanKind.CLIENT)


def _attempt_span(fact: NodeEnded, number: int, attempt: ModelCall, semconv: c.Semconv) -> ReadableSpan:
    """Return the span of a request that failed before the node's own call, beside that one's span."""
    place = replace(fact.trace, span_id=span_id(fact.run_id, f"{fact.id}.attempt.{number}"))
    failed = replace(fact, outcome="failed", error_type=attempt.error_type, error_message=None, trace=place)
    return _chat_span(failed, attempt, semconv)


def _tool_span(fact: ToolEnded) -> ReadableSpan:
    name = fact.tool if fact.known else c.UNKNOWN_TOOL
    attributes = _common(fact)
    attributes |= {
        c.OPERATION_NAME: c.EXECUTE_TOOL,
        c.TOOL_NAME: name,
        c.TOOL_CALL_ID: fact.call_id,
        c.TOOL_TYPE: "function",
        c.TOOL_OUTCOME: fact.outcome,
        c.NODE_INDEX: fact.idx,
    }
    _add_error(attributes, fact.outcome, fact.error_type)
    return _span(fact, f"{c.EXECUTE_TOOL} {name}", attributes, fact.start_ns, fact.end_ns)


def _span(
    fact: NodeEnded | ToolEnded | RunEnded,
    name: str,
    attributes: Attributes,
    start_ns: int,
    end_ns: int,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    links: tuple[Link, ...] = (),
) -> ReadableSpan:
    trace = fact.trace
    return ReadableSpan(
        name[:MAX_NAME],
        context=_context(trace, trace.span_id),
        parent=_context(trace, trace.parent_span_id) if trace.parent_span_id else None,
        resource=_resource(fact.service),
        attributes=_all_cut(attributes),
        links=links,
        kind=kind,
        status=_status(fact.outcome, fact.error_type, fact.error_message),
        start_time=start_ns,
        end_time=end_ns,
        instrumentation_scope=_SCOPE,
    )


def _common(fact: RunFact) -> Attributes:
    attributes: Attributes = {c.AGENT_NAME: fact.agent, c.SCOPE_ID: fact.scope, c.RUN_ID: fact.run_id}
    if fact.session is not None:
        attributes[c.SESSION_ID] = fact.session
        if fact.user is not None:
            attributes[c.CONVERSATION_ID] = c.conversation_id(fact.scope, fact.user, fact.session)
    return attributes


def _add_outcome(attributes: Attributes, fact: RunEnded) -> None:
    attributes[c.RUN_OUTCOME] = fact.outcome
    if fact.reason is not None:
        attributes[c.RUN_REASON] = fact.reason
    if fact.partial:
        attributes[c.TRACE_PARTIAL] = True
    _add_error(attributes, fact.outcome, fact.error_type)


def _add_error(attributes: Attributes, outcome: str, error_type: str | None) -> None:
    """Add the type of an error; a cancelled step has none, a retried tool only if its fact has one."""
    if outcome in _ERRORS:
        attributes[c.ERROR_TYPE] = error_type or "_OTHER"
    elif outcome == "retry" and error_type:
        attributes[c.ERROR_TYPE] = error_type


def _add_usage(attributes: Attributes, call: ModelCall, semconv: c.Semconv) -> None:
    usage = call.usage
    attributes[c.USAGE_SOURCE] = usage.source
    if usage.source == "missing":
        return
    attributes[c.USAGE_INPUT_TOKENS] = usage.input
    attributes[c.USAGE_OUTPUT_TOKENS] = usage.output
    for name, tokens in (
        (c.USAGE_CACHE_READ, usage.cache_read),
        *((name, usage.cache_write) for name in c.USAGE_CACHE_WRITE[semconv]),
        (c.USAGE_REASONING, usage.reasoning),
    ):
        if tokens:
            attributes[name] = tokens


def _status(outcome: str, error_type: str | None, message: str | None) -> Status:
    if outcome in _ERRORS or (outcome == "retry" and error_type):
        return Status(StatusCode.ERROR, _cut(message or error_type or outcome))
    return _UNSET


_UNSET = Status(StatusCode.UNSET)


_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


def _context(trace: Trace, span_id: str) -> SpanContext:
    return _make_context(trace.trace_id, span_id, trace.trace_state)


@lru_cache(maxsize=4096)  # a run's is the parent of all its steps'
def _make_context(trace_id: str, span_id: str, state: str | None) -> SpanContext:
    trace_state = TraceState.from_header([state]) if state else TraceState()
    return SpanContext(int(trace_id, 16), int(span_id, 16), False, _SAMPLED, trace_state)


class _ServiceResource(Resource):
    """A resource that is hashed once: the exporter groups spans by it, and upstream's hash writes JSON each time."""

    def __init__(self, attributes: dict[str, str]) -> None:
        super().__init__(attributes)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


@lru_cache(maxsize=1024)
def _resource(service: Service) -> Resource:
    attributes = {name: _cut(value) for name, value in service.attributes if name}
    attributes["service.name"] = _cut(service.name)
    if service.version is not None:
        attributes["service.version"] = _cut(service.version)
    if service.instance is not None:
        attributes["service.instance.id"] = _cut(service.instance)
    return _ServiceResource(attributes)


def _link(traceparent: str | None) -> Link | None:
    """Return the link to a trace that caused this one; None for what is no traceparent."""
    parts = (traceparent or "").split("-")
    if len(parts) != 4 or len(parts[1]) != 32 or len(parts[2]) != 16:
        return None
    try:
        context = SpanContext(int(parts[1], 16), int(parts[2], 16), True, TraceFlags(int(parts[3], 16)))
    except ValueError:
        return None
    return Link(context) if context.is_valid else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - len(CUT)] + CUT


def _all_cut(attributes: Mapping[str, Value]) -> Attributes:
    """Return attributes whose texts are marked where they had to be cut."""
    return {
        name: _cut(value) if isinstance(value, str) and len(value) > MAX_TEXT else value
        for name, value in attributes.items()
    }
