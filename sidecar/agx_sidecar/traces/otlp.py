"""Sends spans or metrics through an official OTLP exporter and returns what the collector answered.

The exporters return only success or failure. They drop the status, the collector's message and `partial_success`, and
the one for HTTP has no deadline for an answer that arrives byte by byte. So both are observed here at their transport:
this is the only file that depends on how they are built.
"""

from __future__ import annotations

import io
import logging
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import grpc  # type: ignore[import-untyped] # ships no types
import requests
from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # ships no types
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from requests.adapters import HTTPAdapter

from ..log import shorten
from ..settings import PushSettings, Settings, SettingsError
from .encoding import encode_request

_MAX_POINTS = 2_000  # in a request: gRPC takes 4 MiB
_MAX_ANSWER = 64 * 1024  # bytes; an answer has a few
_REFUSED_STATUS = {400, 413, 422}
_REFUSED_CODES = {grpc.StatusCode.INVALID_ARGUMENT}
# The server failed at this request, which may be the fault of what is in it.
_FAILED_STATUS = {500}
_FAILED_CODES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.OUT_OF_RANGE}


class Verdict(Enum):
    """What an answer means for a batch."""

    TAKEN = "taken"
    REFUSED = "refused"  # the spans are at fault: they must not be sent again (OTLP, "failures")
    FAILED = "failed"  # the spans or the collector may be at fault
    UNAVAILABLE = "unavailable"  # the collector, the network or the credentials are at fault: send again later


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one batch; `rejected` of its spans were dropped by a collector that took the others."""

    verdict: Verdict
    rejected: int = 0
    text: str = ""


class Transport(Protocol):
    """Sends batches, one at a time."""

    def send(self, spans: Sequence[ReadableSpan]) -> Answer:
        """Send a batch, with the exporter's own retries; blocks."""

    def cut(self) -> None:
        """End the request that is under way; callable from another thread."""

    def close(self) -> None:
        """Release the connections and end the request that is under way."""


def open_transport(settings: Settings) -> Transport:
    """Return the transport of a protocol; it reads endpoint, headers, certificates and compression from `OTEL_*`.

    Raises:
        SettingsError: those contradict each other.
    """
    _silence()
    try:
        if settings.otlp_protocol == "grpc":
            return _GrpcTransport(settings.otlp_timeout)
        return _HttpTransport(settings.otlp_timeout)
    except Exception as error:  # each exporter has error classes of its own
        raise SettingsError(f"the OTEL_EXPORTER_OTLP_* variables can't be used: {shorten(error)}") from None


def _silence() -> None:
    # The exporters log every attempt; the same text is in the answers.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL + 1)


def _export(exporter: SpanExporter, spans: Sequence[ReadableSpan]) -> Answer | None:
    """Export; return None where the collector's answer decides the result."""
    try:
        if exporter.export(spans) is SpanExportResult.SUCCESS:
            return Answer(Verdict.TAKEN)
    except Exception as error:  # a span that can't be encoded, or a channel that was closed
        return Answer(Verdict.FAILED, text=shorten(error))
    return None


def _taken(reply: ExportTraceServiceResponse) -> Answer:
    partial = reply.partial_success
    return Answer(Verdict.TAKEN, max(0, partial.rejected_spans), shorten(partial.error_message))


# --- HTTP ---


class _HttpTransport:
    def __init__(self, timeout: float) -> None:
        self._session = _Session()
        self._exporter = _HttpExporter(session=self._session, timeout=timeout)

    def send(self, spans: Sequence[ReadableSpan]) -> Answer:
        session = self._session
        session.is_cut = False
        answer = _export(self._exporter, spans)
        if answer is not None and answer.verdict is Verdict.TAKEN:
            try:
                return _taken(ExportTraceServiceResponse.FromString(session.body))
            except DecodeError:  # not every collector answers in the protocol's own format
                return answer
        if answer is not None:
            return answer
        if session.status is None:
            return Answer(Verdict.UNAVAILABLE if session.error else Verdict.FAILED, text=session.error or "not sent")
        verdict = Verdict.REFUSED if session.status in _REFUSED_STATUS else Verdict.UNAVAILABLE
        verdict = Verdict.FAILED if session.status in _FAILED_STATUS else verdict
        return Answer(verdict, text=f"HTTP status {session.status}")

    def cut(self) -> None:
        self._session.cut()

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call] # upstream's
        self._session.cut()


class _HttpExporter(HttpSpanExporter):
    """Sends requests that are encoded here."""

    _client: Any

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        is_taken = self._client.export(encode_request(spans)).success
        return SpanExportResult.SUCCESS if is_taken else SpanExportResult.FAILURE


class _Session(requests.Session):
    """Keeps the last answer, and the sockets of its connections, so that a request can be ended from outside."""

    status: int | None
    body: bytes
    error: str

    def __init__(self) -> None:
        super().__init__()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self._sockets))
        self.is_cut = False
        self._forget()

    def _forget(self) -> None:
        self.status, self.body, self.error = None, b"", ""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        self._forget()
        try:
            self._check_cut()
            response = super().request(*args, **{**kwargs, "stream": True})
            with response:
                self.body = response.raw.read(_MAX_ANSWER, decode_content=True)
            self._check_cut()
        except Exception as error:
            self.error = shorten(error)
            raise
        response.raw = io.BytesIO(self.body)
        self.status = response.status_code
        return response

    def _check_cut(self) -> None:
        """Raise if the request was ended from outside: what was read until then would pass for a whole answer."""
        if self.is_cut:
            raise TimeoutError("the answer took too long")

    def cut(self) -> None:
        self.is_cut = True
        for each in list(self._sockets):
            with suppress(OSError):  # it is closed
                each.shutdown(socket.SHUT_RDWR)


class _Adapter(HTTPAdapter):
    def __init__(self, sockets: weakref.WeakSet[socket.socket]) -> None:
        self._sockets = sockets
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        if not hasattr(pool.ConnectionCls, "reports_socket"):
            pool.ConnectionCls = _reporting(pool.ConnectionCls, self._sockets)
        return pool


def _reporting(base: Any, sockets: weakref.WeakSet[socket.socket]) -> Any:
    class Reporting(base):  # type: ignore[misc] # a class that is known at run time
        reports_socket = True

        def connect(self) -> None:
            super().connect()
            sockets.add(self.sock)

    return Reporting


# --- gRPC, which has a deadline for the whole call ---


class _GrpcTransport:
    def __init__(self, timeout: float) -> None:
        self._exporter = _GrpcExporter(timeout=timeout)

    def send(self, spans: Sequence[ReadableSpan]) -> Answer:
        last = self._exporter.last = _LastCall()
        answer = _export(self._exporter, spans)
        if answer is not None and answer.verdict is Verdict.TAKEN:
            return _taken(last.reply)
        if answer is not None:
            return answer
        verdict = Verdict.REFUSED if last.code in _REFUSED_CODES else Verdict.UNAVAILABLE
        verdict = Verdict.FAILED if last.code in _FAILED_CODES else verdict
        name = last.code.name if last.code is not None else "not sent"
        return Answer(verdict, text=f"{name}: {shorten(last.details)}")

    def cut(self) -> None:
        """Nothing: the call has a deadline."""

    def close(self) -> None:
        self._exporter.shutdown()


class _LastCall:
    def __init__(self) -> None:
        self.reply = ExportTraceServiceResponse()
        self.code: grpc.StatusCode | None = None
        self.details = ""


class _GrpcExporter(GrpcSpanExporter):
    """Keeps the reply of the last call, or its error."""

    last: _LastCall

    def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        request = ExportTraceServiceRequest()
        request.ParseFromString(encode_request(data))
        return request

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call] # upstream's
        self._client: Any = _ObservedStub(self, self._client)


class _ObservedStub:
    def __init__(self, exporter: _GrpcExporter, stub: Any) -> None:
        self._exporter = exporter
        self._stub = stub

    def Export(self, **kwargs: Any) -> ExportTraceServiceResponse:
        last = self._exporter.last
        try:
            last.reply = self._stub.Export(**kwargs)
        except grpc.RpcError as error:
            last.code, last.details = error.code(), str(error.details())
            raise
        return last.reply


# --- metrics ---


class MetricTransport:
    """Sends metrics, one push at a time.

    Raises:
        SettingsError: the `OTEL_*` variables contradict each other.
    """

    def __init__(self, settings: PushSettings) -> None:
        _silence()
        self._session = _Session() if settings.protocol == "http/protobuf" else None
        self._exporter: MetricExporter
        try:
            if self._session is not None:
                self._exporter = HttpMetricExporter(
                    session=self._session, timeout=settings.timeout, max_export_batch_size=_MAX_POINTS
                )
            else:
                self._exporter = GrpcMetricExporter(timeout=settings.timeout, max_export_batch_size=_MAX_POINTS)
        except Exception as error:  # each exporter has error classes of its own
            raise SettingsError(f"the OTEL_EXPORTER_OTLP_* variables can't be used: {shorten(error)}") from None

    def send(self, data: MetricsData) -> str:
        """Send one push, with the exporter's own retries; blocks. Returns why it failed, or nothing."""
        if self._session is not None:
            self._session.is_cut = False
        try:
            if self._exporter.export(data) is MetricExportResult.SUCCESS:
                return ""
        except Exception as error:  # a channel that was closed
            return shorten(error)
        if self._session is None:
            return "the collector did not take them"
        return self._session.error or f"HTTP status {self._session.status}"

    def cut(self) -> None:
        """End the request that is under way; callable from another thread. By gRPC it has a deadline."""
        if self._session is not None:
            self._session.cut()

    def close(self) -> None:
        """Release the connections and end the request that is under way."""
        self._exporter.shutdown()
        self.cut()
