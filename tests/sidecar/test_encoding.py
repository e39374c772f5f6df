"""The encoder of spans: whatever a span has, a decoder finds what the official encoder would have sent."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceState

from agx_sidecar.traces.encoding import encode_request

CONTEXT = SpanContext(2**127 + 5, 2**63 + 7, is_remote=False)
PARENT = SpanContext(CONTEXT.trace_id, 9, is_remote=True, trace_state=TraceState([("vendor", "a"), ("other", "b")]))
VALUES = [True, False, 1, 1.0, 0, -1, 2**63 - 1, -(2**63), 0.5, "", "ü" * 30, "x" * 5_000, ("stop", "length"), ["a", 1]]


def decoded(spans: list[ReadableSpan]) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    request.ParseFromString(encode_request(spans))
    return request


def span(name: str = "chat", **changes: Any) -> ReadableSpan:
    given: dict[str, Any] = {"context": CONTEXT, "start_time": 1, "end_time": 2**63}
    return ReadableSpan(name, **(given | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"context": PARENT, "parent": CONTEXT},
        {"parent": PARENT, "kind": SpanKind.CLIENT},
        {"name": "ü" * 3_000, "kind": SpanKind.CONSUMER},
        {"attributes": {f"a{n}": value for n, value in enumerate(VALUES)}},
        {"attributes": {"lone": "\ud800", "large": 2**63, "kept": "x"}},
        {"attributes": {f"a{n}": n for n in range(300)}},
        {"events": [Event("part", {"idx": 1, "text": "x" * 200}, 5), Event("end", {}, 6), Event("none", None, 7)]},
        {"links": [Link(PARENT, {"why": "follows"}), Link(CONTEXT)]},
        {"status": Status(StatusCode.ERROR, "it failed")},
        {"status": Status(StatusCode.ERROR)},
        {"status": Status(StatusCode.OK)},
        {"start_time": None, "end_time": None},
        {"instrumentation_scope": None},
        {"instrumentation_scope": InstrumentationScope("agx", "1", "https://schema")},
        {"resource": Resource({"service.name": "shop", "n": 1}, "https://schema")},
    ],
    ids="-".join,
)
def test_what_is_decoded_is_what_the_official_encoder_sends(changes: dict[str, Any]) -> None:
    spans = [span(**changes), span()]
    assert decoded(spans) == encode_spans(spans)
    assert decoded(spans) == encode_spans(spans)  # with what was kept of the first time


@pytest.mark.parametrize("odd", [span("\ud800"), span(start_time=-1)], ids=["name", "time"])
def test_what_no_request_can_hold_raises(odd: ReadableSpan) -> None:
    for encode in (encode_spans, encode_request):
        with pytest.raises((ValueError, struct.error)):
            encode([odd])


VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(max_size=5), VALUE))
def test_any_attribute(attributes: dict[str, Any]) -> None:
    spans = [span(attributes=attributes, events=[Event("e", attributes, 1)])]
    assert decoded(spans) == encode_spans(spans)
