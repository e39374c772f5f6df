"""One golden span per kind and outcome: names, kinds, ids, attributes, status, by the conventions' letter."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from support.made_facts import (
    CHAT_SPAN,
    RUN_SPAN,
    SERVICE,
    T0,
    TOOL_SPAN,
    TRACE_ID,
    call,
    ended,
    node,
    resumed,
    started,
    tool,
    trace,
    usage,
)

from agx.facts.schema import (
    Fact,
    Service,
    StreamEvent,
    Trace,
    Usage,
    stream_span_id,
)
from agx.telemetry.conventions import Semconv
from agx_sidecar.traces.spans import CUT, MAX_TEXT, spans_of


def test_the_span_of_a_dead_attempt_is_exported_where_the_next_one_has_its_own() -> None:
    assert spans_of(resumed()) == []
    dead = trace(sdk=True)
    span = one(resumed(attempt=2, trace=trace("c" * 16, RUN_SPAN, sdk=True), before=dead, before_start_ns=T0))
    assert span.context is not None
    assert span.attributes is not None
    assert (f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}") == (TRACE_ID, RUN_SPAN)
    assert (span.name, span.parent, span.start_time, span.end_time) == ("agx.run support", None, T0, T0 + 10_000)
    assert span.attributes["agx.run.attempt"] == "1"
    assert span.attributes["agx.trace.partial"] is True
    assert span.status.status_code is StatusCode.UNSET


def one(fact: Fact) -> ReadableSpan:
    (span,) = spans_of(fact)
    return span


def shown(span: ReadableSpan) -> dict[str, Any]:
    """A span as something to compare."""
    assert span.context
    return {
        "name": span.name,
        "kind": span.kind,
        "trace": f"{span.context.trace_id:032x}",
        "id": f"{span.context.span_id:016x}",
        "parent": f"{span.parent.span_id:016x}" if span.parent else None,
        "times": (span.start_time, span.end_time),
        "status": (span.status.status_code, span.status.description),
        "attributes": dict(span.attributes or {}),
        "resource": dict(span.resource.attributes),
    }


RUN = {
    "gen_ai.agent.name": "support",
    "agx.scope.id": "acme",
    "agx.run.id": "run-1",
    "gen_ai.conversation.id": "acme/u1/s1",
    "agx.session.id": "s1",
}
RESOURCE = {
    "service.name": "shop",
    "service.version": "1.2.3",
    "service.instance.id": "pod-1",
    "deployment.environment.name": "staging",
}
UNSET = (StatusCode.UNSET, None)


def test_a_chat_span() -> None:
    assert shown(one(node())) == {
        "name": "chat gpt-4o-mini",
        "kind": SpanKind.CLIENT,
        "trace": TRACE_ID,
        "id": CHAT_SPAN,
        "parent": RUN_SPAN,
        "times": (T0 + 10_000, T0 + 600_010_000),
        "status": UNSET,
        "attributes": {
            **RUN,
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "gpt-4o-mini",
            "gen_ai.request.stream": True,
            "gen_ai.response.model": "gpt-4o-mini-2024-07-18",
            "gen_ai.response.id": "resp-1",
            "gen_ai.response.finish_reasons": ("stop",),
            "gen_ai.response.time_to_first_chunk": 0.15,
            "gen_ai.usage.input_tokens": 1_000,
            "gen_ai.usage.output_tokens": 200,
            "gen_ai.usage.cache_read.input_tokens": 300,
            "gen_ai.usage.cache_creation.input_tokens": 50,
            "gen_ai.usage.reasoning.output_tokens": 40,
            "agx.usage.source": "reported",
            "agx.node.kind": "model_request",
            "agx.node.idx": 0,
            "agx.node.outcome": "completed",
        },
        "resource": RESOURCE,
    }


@pytest.mark.parametrize(
    ("semconv", "names"), [("current", {"creation"}), ("both", {"creation", "write"}), ("next", {"write"})]
)
def test_tokens_written_to_a_cache_have_the_names_of_the_mode(semconv: Semconv, names: set[str]) -> None:
    (span,) = spans_of(node(), semconv)
    found = {name for name in span.attributes or {} if "cache_" in name and "read" not in name}
    assert found == {f"gen_ai.usage.cache_{name}.input_tokens" for name in names}


def test_a_tool_span() -> None:
    assert shown(one(tool())) == {
        "name": "execute_tool lookup",
        "kind": SpanKind.INTERNAL,
        "trace": TRACE_ID,
        "id": TOOL_SPAN,
        "parent": RUN_SPAN,
        "times": (T0 + 20_000, T0 + 30_020_000),
        "status": UNSET,
        "attributes": {
            **RUN,
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": "lookup",
            "gen_ai.tool.call.id": "call-1",
            "gen_ai.tool.type": "function",
            "agx.tool.outcome": "ok",
            "agx.node.idx": 0,
        },
        "resource": RESOURCE,
    }


@pytest.mark.parametrize(
    ("changes", "added", "status"),
    [
        ({"outcome": "completed"}, {}, UNSET),
        ({"outcome": "cancelled", "reason": "cancel"}, {"agx.run.reason": "cancel"}, UNSET),
        (
            {"outcome": "failed", "error_type": "ModelHTTPError"},
            {"error.type": "ModelHTTPError"},
            (StatusCode.ERROR, "ModelHTTPError"),
        ),
        (
            {"outcome": "failed", "error_type": "ModelHTTPError", "error_message": "status 503"},
            {"error.type": "ModelHTTPError"},
            (StatusCode.ERROR, "status 503"),
        ),
        (
            {"outcome": "lost", "partial": True},
            {"error.type": "_OTHER", "agx.trace.partial": True},
            (StatusCode.ERROR, "lost"),
        ),
    ],
)
def test_a_run_and_its_stream(changes: dict[str, Any], added: dict[str, Any], status: tuple[Any, Any]) -> None:
    run, stream = spans_of(ended(**changes))
    outcome = {"agx.run.outcome": changes["outcome"], **added}
    times = (T0, T0 + 2_500_000_000)
    common = {"kind": SpanKind.INTERNAL, "trace": TRACE_ID, "times": times, "status": status, "resource": RESOURCE}
    assert shown(run) == {
        **common,
        "name": "invoke_agent support",
        "id": RUN_SPAN,
        "parent": None,
        "attributes": {**RUN, "gen_ai.operation.name": "invoke_agent", **outcome},
    }
    assert shown(stream) == {
        **common,
        "name": "agx.stream",
        "id": stream_span_id("run-1"),
        "parent": RUN_SPAN,
        "attributes": {**RUN, **outcome},
    }
    assert [(event.name, event.timestamp, dict(event.attributes or {})) for event in stream.events] == [
        ("begin", T0 + 1_000, {}),
        ("part", T0 + 1_500, {"idx": 0, "part_kind": "text"}),
        ("end", T0 + 2_000, {"outcome": "completed"}),
    ]


@pytest.mark.parametrize(
    ("outcome", "error_type", "status", "error"),
    [
        ("ok", None, UNSET, None),
        ("cancelled", "CancelledError", UNSET, None),
        ("retry", None, UNSET, None),
        ("retry", "ModelRetry", (StatusCode.ERROR, "ModelRetry"), "ModelRetry"),
        ("error", "ValueError", (StatusCode.ERROR, "ValueError"), "ValueError"),
        ("error", None, (StatusCode.ERROR, "error"), "_OTHER"),
    ],
)
def test_the_outcomes_of_a_tool(
    outcome: str, error_type: str | None, status: tuple[Any, Any], error: str | None
) -> None:
    span = shown(one(tool(outcome=outcome, error_type=error_type)))
    assert span["status"] == status
    assert span["attributes"].get("error.type") == error
    assert span["attributes"]["agx.tool.outcome"] == outcome


@pytest.mark.parametrize("outcome", ["denied", "deferred"])
def test_a_tool_that_was_not_run_has_no_span(outcome: str) -> None:
    assert spans_of(tool(outcome=outcome)) == []


def test_a_cancelled_model_request_keeps_its_partial_usage() -> None:
    span = shown(one(node(outcome="cancelled", model=call(finish_reason=None, usage=usage(source="estimated")))))
    assert span["status"] == UNSET
    assert "error.type" not in span["attributes"]
    assert "gen_ai.response.finish_reasons" not in span["attributes"]
    assert span["attributes"]["agx.usage.source"] == "estimated"
    assert span["attributes"]["gen_ai.usage.output_tokens"] == 200


def test_a_failed_model_request_without_usage() -> None:
    failed = node(
        outcome="failed",
        error_type="ModelHTTPError",
        model=call(response_model=None, response_id=None, first_chunk_ns=None, usage=usage(source="missing")),
    )
    attributes = shown(one(failed))["attributes"]
    assert attributes["error.type"] == "ModelHTTPError"
    assert attributes["agx.usage.source"] == "missing"
    assert not [name for name in attributes if name.startswith("gen_ai.usage") or "first_chunk" in name]


def test_each_failed_attempt_has_a_span_beside_the_request_that_was_answered() -> None:
    attempts = tuple(
        call(request_model="first", usage=Usage(source="missing"), error_type=error) for error in ("Busy", "rejected")
    )
    spans = spans_of(node(failed_attempts=attempts))
    assert [span.name for span in spans] == ["chat first", "chat first", "chat gpt-4o-mini"]
    assert [span.status.status_code for span in spans] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [(span.attributes or {}).get("error.type") for span in spans] == ["Busy", "rejected", None]
    assert len({span.context.span_id for span in spans if span.context}) == 3
    assert len({span.parent.span_id for span in spans if span.parent}) == 1


def test_a_missing_finish_reason_is_marked() -> None:
    attributes = shown(one(node(model=call(finish_reason="stop", finish_reason_missing=True))))["attributes"]
    assert attributes["agx.finish_reason"] == "missing"


def test_other_nodes_and_starts_are_no_spans() -> None:
    assert spans_of(node(node="call_tools", model=None)) == []
    assert spans_of(started()) == []


def test_unsampled_runs_have_no_spans() -> None:
    unsampled = {"trace": trace(sampled=False)}
    assert [spans_of(fact(**unsampled)) for fact in (started, node, tool, ended)] == [[], [], [], []]  # type: ignore[operator]


def test_with_an_sdk_only_the_stream_is_reported() -> None:
    sdk = {"trace": trace(sdk=True)}
    assert spans_of(node(**sdk)) == spans_of(tool(**sdk)) == []
    assert [span.name for span in spans_of(ended(**sdk))] == ["agx.stream"]


def test_with_an_sdk_that_died_the_run_is_reported_too() -> None:
    spans = spans_of(ended(trace=trace(sdk=True), outcome="lost", partial=True))
    assert [span.name for span in spans] == ["agx.run support", "agx.stream"]
    assert spans[0].attributes
    assert spans[0].attributes["agx.trace.partial"] is True


@pytest.mark.parametrize("changes", [{"session": None}, {"stream": None}])
def test_a_run_without_a_stream_has_no_stream_span(changes: dict[str, Any]) -> None:
    assert [span.name for span in spans_of(ended(**changes))] == ["invoke_agent support"]


def test_a_sub_agent_hangs_under_its_tool() -> None:
    span = one(ended("run-2", session=None, parent_run_id="run-1", trace=trace("1122334455667788", TOOL_SPAN)))
    assert shown(span)["parent"] == TOOL_SPAN


def test_the_trace_that_caused_a_run_is_linked() -> None:
    other = "4bf92f3577b34da6a3ce929d0e0e4736"
    run, stream = spans_of(ended(follows=f"00-{other}-00f067aa0ba902b7-01"))
    (link,) = run.links
    assert f"{link.context.trace_id:032x}" == other
    assert link.context.is_remote
    assert stream.links == ()


@pytest.mark.parametrize(
    "follows", ["", "nonsense", "00-xyz-1-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "a-b-c-d"]
)
def test_what_is_no_traceparent_is_no_link(follows: str) -> None:
    assert spans_of(ended(follows=follows))[0].links == ()


def test_events_left_out_are_said_to_be_dropped() -> None:
    _, stream = spans_of(ended(events_between=500))
    assert stream.dropped_events == 500
    assert (stream.attributes or {})["agx.stream.events_between"] == 500
    encoded = encode_spans([stream]).resource_spans[0].scope_spans[0].spans[0]
    assert encoded.dropped_events_count == 500


def test_a_service_without_version_and_instance() -> None:
    assert shown(one(tool(service=Service("only-a-name"))))["resource"] == {"service.name": "only-a-name"}
    odd = Service("own", attributes=(("service.name", "other"), ("", "nameless"), ("long", "x" * 5_000)))
    resource = shown(one(tool(service=odd)))["resource"]
    assert (resource.pop("service.name"), set(resource)) == ("own", {"long"})
    assert len(resource["long"]) < 5_000


def test_trace_state_is_kept() -> None:
    state = Trace(TRACE_ID, RUN_SPAN, None, True, False, "vendor=abc,other=1")
    span = spans_of(ended(trace=state))[0]
    assert span.context
    assert span.context.trace_state.to_header() == "vendor=abc,other=1"


def test_long_attributes_are_cut_and_say_so() -> None:
    long = "x" * 10_000
    span = one(tool(call_id=long))
    value = (span.attributes or {})["gen_ai.tool.call.id"]
    assert isinstance(value, str)
    assert len(value) == MAX_TEXT
    assert value.endswith(CUT)
    _, stream = spans_of(ended(events=(StreamEvent(T0, "error", {"error.type": long}),)))
    assert len((stream.events[0].attributes or {})["error.type"]) == MAX_TEXT  # type: ignore[arg-type]


def test_every_span_can_be_encoded() -> None:
    facts = (node(), tool(), ended(), ended(trace=trace(sdk=True), partial=True), node(service=SERVICE))
    spans = [span for fact in facts for span in spans_of(fact)]
    encoded = encode_spans(spans)
    assert sum(len(scope.spans) for resource in encoded.resource_spans for scope in resource.scope_spans) == len(spans)


def test_two_tenants_with_one_session_id_have_two_conversations() -> None:
    facts = [of_tenant for scope in ("acme", "other") for of_tenant in (node(scope=scope), ended(scope=scope))]
    named = {(span.attributes or {})["gen_ai.conversation.id"] for fact in facts for span in spans_of(fact)}
    assert named == {"acme/u1/s1", "other/u1/s1"}


def test_a_tool_that_the_agent_does_not_have_gives_no_name_to_a_span() -> None:
    span = one(tool(tool="drop all tables; " * 20, known=False))
    assert span.name == "execute_tool __unknown__"
    assert (span.attributes or {})["gen_ai.tool.name"] == "__unknown__"
    assert "drop all" not in str(shown(span))


def test_names_are_cut_at_200_characters_and_every_text_is_bounded() -> None:
    long = "x" * 20_000
    event = StreamEvent(1, long, {"text": long})
    for fact in (node(agent=long, run_id=long), tool(tool=long), ended(agent=long, scope=long, events=(event,))):
        for span in spans_of(fact):
            assert len(span.name) <= 200
            texts = [
                *(span.attributes or {}).values(),
                *(text for each in span.events for text in each.attributes.values()),
            ]
            assert max(len(text) for text in texts if isinstance(text, str)) == MAX_TEXT
            assert all(len(each.name) <= 200 for each in span.events)
