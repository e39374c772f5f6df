"""An OTLP receiver: decodes the spans and metrics that come by HTTP or gRPC, and fails on demand."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self

import grpc  # type: ignore[import-untyped]  # ships no types
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

Value = str | bool | int | float | bytes | list["Value"] | dict[str, "Value"] | None

_GRPC_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    413: grpc.StatusCode.OUT_OF_RANGE,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """An event of a span."""

    name: str
    at_ns: int
    attributes: dict[str, Value]


@dataclass(frozen=True, slots=True)
class SpanLink:
    """A link of a span to another trace, ids in hex."""

    trace_id: str
    span_id: str
    attributes: dict[str, Value]


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """A span as the collector saw it: ids in hex, names of enums without their prefix (`CLIENT`, `ERROR`)."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_span_id: str | None
    trace_state: str
    start_ns: int
    end_ns: int
    status: str
    attributes: dict[str, Value]
    events: list[SpanEvent]
    links: list[SpanLink]
    dropped_events: int
    resource: dict[str, Value]
    scope: str


@dataclass(frozen=True, slots=True)
class ReceivedPoint:
    """A point of a metric: `value` is a number, or the sum of a histogram."""

    name: str
    kind: str  # sum, gauge, histogram
    unit: str
    attributes: dict[str, Value]
    resource: dict[str, Value]
    start_ns: int
    time_ns: int
    value: float
    counts: tuple[int, ...]
    bounds: tuple[float, ...]

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two points belong to one series."""
        return self.name, tuple(sorted(self.attributes.items())), tuple(sorted(self.resource.items()))


@dataclass(frozen=True, slots=True)
class Export:
    """One export request, refused or not."""

    protocol: str  # http or grpc
    headers: Mapping[str, str]  # names in lower case
    size: int  # bytes, uncompressed
    spans: list[ReceivedSpan]


@dataclass
class _Fault:
    status: int
    when: Callable[[ReceivedSpan], bool]


@dataclass
class OtlpReceiver:
    """A collector on loopback, for HTTP and gRPC at once; a context manager."""

    exports: list[Export] = field(default_factory=list)
    _accepted: list[ReceivedSpan] = field(default_factory=list)
    points: list[ReceivedPoint] = field(default_factory=list)  # of metrics, in the order of their arrival
    rejected: int = 0  # spans that each answer says were rejected of those that were taken
    stall: Literal["", "drip", "hang"] = ""  # by HTTP: answers a byte at a time, or not at all
    _fault: _Fault | None = None
    closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def spans(self) -> list[ReceivedSpan]:
        """The spans that were accepted, in the order of their arrival."""
        with self._lock:
            return list(self._accepted)

    @property
    def endpoint_http(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT: the base, to which exporters add /v1/traces."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def endpoint_grpc(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT with the protocol grpc."""
        return f"http://127.0.0.1:{self._grpc_port}"

    def fail_with(self, status: int, when: Callable[[ReceivedSpan], bool] = lambda span: True) -> None:
        """Refuse exports with this HTTP status, or what gRPC calls it; only those that contain a span like `when`."""
        self._fault = _Fault(status, when)

    def recover(self) -> None:
        """Accept exports again."""
        self._fault = None

    def clear(self) -> None:
        """Forget what came so far."""
        with self._lock:
            self._accepted.clear()
            self.exports.clear()

    def receive(self, protocol: str, headers: Mapping[str, str], request: ExportTraceServiceRequest) -> int:
        """Take a request; return its HTTP status."""
        spans = list(_decode(request))
        with self._lock:
            self.exports.append(Export(protocol, headers, request.ByteSize(), spans))
            if (fault := self._fault) and any(fault.when(span) for span in spans):
                return fault.status
            self._accepted.extend(spans)
        return 200

    def receive_metrics(self, request: ExportMetricsServiceRequest) -> int:
        """Take a request of metrics; return its HTTP status."""
        if (fault := self._fault) is not None:
            return fault.status
        points = list(_points(request))
        with self._lock:
            self.points.extend(points)
        return 200

    def __enter__(self) -> Self:
        self._http = _HttpServer(self)
        self._http_thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), name="otlp-http")
        self._http_thread.start()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="otlp-grpc")
        self._grpc = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        add_TraceServiceServicer_to_server(_GrpcService(self), self._grpc)  # type: ignore[no-untyped-call]  # generated
        add_MetricsServiceServicer_to_server(_GrpcMetrics(self), self._grpc)  # type: ignore[no-untyped-call]
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        return self

    def response(self) -> ExportTraceServiceResponse:
        """Return what is answered to a request that is taken."""
        response = ExportTraceServiceResponse()
        if self.rejected:
            response.partial_success.rejected_spans = self.rejected
            response.partial_success.error_message = "too old"
        return response

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._grpc.stop(None).wait()
        self._pool.shutdown()
        self._http.shutdown()
        self._http.server_close()
        self._http_thread.join()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False  # so that closing the server waits for its requests

    def __init__(self, receiver: OtlpReceiver) -> None:
        super().__init__(("127.0.0.1", 0), _HttpHandler)
        self.receiver = receiver

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that was killed before its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type] # handed on as they came


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _HttpServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status = 404
        if self.path == "/v1/traces":
            headers = {name.lower(): value for name, value in self.headers.items()}
            status = self.server.receiver.receive("http", headers, ExportTraceServiceRequest.FromString(body))
        elif self.path == "/v1/metrics":
            status = self.server.receiver.receive_metrics(ExportMetricsServiceRequest.FromString(body))
        receiver = self.server.receiver
        if receiver.stall:
            self._stall(drips=receiver.stall == "drip")
            return
        answer = receiver.response().SerializeToString() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        # A kept connection would outlive the receiver, in a thread that waits for its next request.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def _stall(self, *, drips: bool) -> None:
        """Never finish the answer; until the client or the test ends."""
        self.close_connection = True
        with suppress(ConnectionError):
            if drips:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            while not self.server.receiver.closing.wait(0.1):
                if drips:
                    self.wfile.write(b"x")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _GrpcService(TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        headers = {str(name): str(value) for name, value in context.invocation_metadata()}
        status = self._receiver.receive("grpc", headers, request)
        if status != 200:
            context.abort(_GRPC_STATUS[status], "refused by the test")
        return self._receiver.response()


class _GrpcMetrics(MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        if (status := self._receiver.receive_metrics(request)) != 200:
            context.abort(_GRPC_STATUS[status], "refused by the test")
        return ExportMetricsServiceResponse()


def _points(request: ExportMetricsServiceRequest) -> Iterable[ReceivedPoint]:
    for of_resource in request.resource_metrics:
        resource = _attributes(of_resource.resource.attributes)
        for metric in (metric for scope in of_resource.scope_metrics for metric in scope.metrics):
            kind = metric.WhichOneof("data")
            for point in getattr(metric, kind).data_points:
                is_histogram = kind == "histogram"
                yield ReceivedPoint(
                    name=metric.name,
                    kind=kind,
                    unit=metric.unit,
                    attributes=_attributes(point.attributes),
                    resource=resource,
                    start_ns=point.start_time_unix_nano,
                    time_ns=point.time_unix_nano,
                    value=point.sum if is_histogram else getattr(point, point.WhichOneof("value")),
                    counts=tuple(point.bucket_counts) if is_histogram else (),
                    bounds=tuple(point.explicit_bounds) if is_histogram else (),
                )


def _decode(request: ExportTraceServiceRequest) -> Iterable[ReceivedSpan]:
    for of_resource in request.resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield _span(span, resource, of_scope.scope.name)


def _span(span: trace_pb2.Span, resource: dict[str, Value], scope: str) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        trace_state=span.trace_state,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        attributes=_attributes(span.attributes),
        events=[SpanEvent(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events],
        links=[SpanLink(li.trace_id.hex(), li.span_id.hex(), _attributes(li.attributes)) for li in span.links],
        dropped_events=span.dropped_events_count,
        resource=resource,
        scope=scope,
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case kind:
            plain: Value = getattr(value, kind)
            return plain
