"""One golden trace per outcome and mode, with fixed clock and ids: what the sidecar sends of a whole run."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support.made_facts import CHAT_SPAN, RUN_SPAN, T0, TOOL_SPAN, TRACE_ID, call, ended, node, started, tool, trace

from agx.facts.schema import Fact, stream_span_id
from agx_sidecar.traces.encoding import encode_request
from agx_sidecar.traces.spans import spans_of

CHAT_2 = "00f067aa0ba902b8"
STREAM = stream_span_id("run-1")
MS = 1_000_000
NAMES = {RUN_SPAN: "run", CHAT_SPAN: "chat-1", TOOL_SPAN: "tool", CHAT_2: "chat-2", STREAM: "stream", "": "-"}
SHOWN = ("agx.run.outcome", "agx.run.reason", "agx.node.outcome", "agx.tool.outcome", "error.type", "agx.trace.partial",
         "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")  # fmt: skip

# How each run ended: what its last model request says, and its end.
ENDINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "completed": ({}, {}),
    "cancelled": ({}, {"reason": "cancel", "stage": "model_request"}),
    "failed": ({"error_type": "ModelHTTPError"}, {"error_type": "ModelHTTPError"}),
    "lost": ({"error_type": "lost"}, {"error_type": "lost", "partial": True}),
}

# Span, its parent, kind, start and end in ms, name, status; then the attributes of SHOWN that it has. With an SDK the
# rest is the service's to send: tests/integration/test_whole_traces.py has both halves.
GOLDEN = {
    ("completed", "no SDK"): [
        "chat-1 < run CLIENT 10-600 chat gpt-4o-mini UNSET completed 1000 200",
        "tool < run INTERNAL 610-690 execute_tool lookup UNSET ok",
        "chat-2 < run CLIENT 700-2400 chat gpt-4o-mini UNSET completed 1000 200",
        "run < - INTERNAL 0-2500 invoke_agent support UNSET completed",
        "stream < run INTERNAL 0-2500 agx.stream UNSET completed",
    ],
    ("completed", "SDK"): [
        "stream < run INTERNAL 0-2500 agx.stream UNSET completed",
    ],
    ("cancelled", "no SDK"): [
        "chat-1 < run CLIENT 10-600 chat gpt-4o-mini UNSET completed 1000 200",
        "tool < run INTERNAL 610-690 execute_tool lookup UNSET ok",
        "chat-2 < run CLIENT 700-2400 chat gpt-4o-mini UNSET cancelled 1000 200",
        "run < - INTERNAL 0-2500 invoke_agent support UNSET cancelled cancel",
        "stream < run INTERNAL 0-2500 agx.stream UNSET cancelled cancel",
    ],
    ("cancelled", "SDK"): [
        "stream < run INTERNAL 0-2500 agx.stream UNSET cancelled cancel",
    ],
    ("failed", "no SDK"): [
        "chat-1 < run CLIENT 10-600 chat gpt-4o-mini UNSET completed 1000 200",
        "tool < run INTERNAL 610-690 execute_tool lookup UNSET ok",
        "chat-2 < run CLIENT 700-2400 chat gpt-4o-mini ERROR failed ModelHTTPError 1000 200",
        "run < - INTERNAL 0-2500 invoke_agent support ERROR failed ModelHTTPError",
        "stream < run INTERNAL 0-2500 agx.stream ERROR failed ModelHTTPError",
    ],
    ("failed", "SDK"): [
        "stream < run INTERNAL 0-2500 agx.stream ERROR failed ModelHTTPError",
    ],
    ("lost", "no SDK"): [
        "chat-1 < run CLIENT 10-600 chat gpt-4o-mini UNSET completed 1000 200",
        "tool < run INTERNAL 610-690 execute_tool lookup UNSET ok",
        "chat-2 < run CLIENT 700-2400 chat gpt-4o-mini ERROR lost lost 1000 200",
        "run < - INTERNAL 0-2500 invoke_agent support ERROR lost lost True",
        "stream < run INTERNAL 0-2500 agx.stream ERROR lost lost True",
    ],
    ("lost", "SDK"): [
        "run < - INTERNAL 0-2500 agx.run support ERROR lost lost True",
        "stream < run INTERNAL 0-2500 agx.stream ERROR lost lost True",
    ],
}


def _run(outcome: str, *, sdk: bool) -> list[Fact]:
    """A run that asks its model, calls a tool and asks again; it ends in the second request."""
    last, end = ENDINGS[outcome]

    def of(span: str, parent: str | None = RUN_SPAN) -> dict[str, Any]:
        return {"trace": trace(span, parent, sdk=sdk)}

    first_call = call(start_ns=T0 + 10 * MS, end_ns=T0 + 600 * MS)
    second_call = call(start_ns=T0 + 700 * MS, end_ns=T0 + 2_400 * MS)
    return [
        started(**of(RUN_SPAN, None)),
        node(idx=0, model=first_call, **of(CHAT_SPAN)),
        tool(start_ns=T0 + 610 * MS, end_ns=T0 + 690 * MS, **of(TOOL_SPAN)),
        node(idx=1, node="call_tools", model=None, **of(RUN_SPAN, None)),
        node(idx=1, outcome=outcome, model=second_call, **last, **of(CHAT_2)),
        ended(outcome=outcome, **end, **of(RUN_SPAN, None)),
    ]


def _said(span: Span) -> str:
    """A span as the collector gets it."""
    assert span.trace_id.hex() == TRACE_ID
    times = f"{(span.start_time_unix_nano - T0) // MS}-{(span.end_time_unix_nano - T0) // MS}"
    kind = Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_")
    status = Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_")
    values = {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}
    words = [NAMES[span.span_id.hex()], "<", NAMES[span.parent_span_id.hex()], kind, times, span.name, status]
    return " ".join([*words, *(str(values[name]) for name in SHOWN if name in values)])


@pytest.mark.parametrize(("outcome", "mode"), list(GOLDEN))
def test_a_whole_trace(outcome: str, mode: str) -> None:
    spans = [span for fact in _run(outcome, sdk=mode == "SDK") for span in spans_of(fact)]
    request = ExportTraceServiceRequest.FromString(encode_request(spans))
    assert request == encode_spans(spans)
    sent = [span for of in request.resource_spans for scope in of.scope_spans for span in scope.spans]
    assert [_said(span) for span in sent] == GOLDEN[outcome, mode]
