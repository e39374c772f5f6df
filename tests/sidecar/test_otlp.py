"""The official exporters over real HTTP and gRPC: what their collector answers, in part, slowly or never."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Literal

import pytest
from support.made_facts import ended
from support.otlp import OtlpReceiver
from support.replica import Queue, StartReplica
from support.waiting import wait_until_sync

from agx_sidecar.settings import Settings, read_settings
from agx_sidecar.traces.otlp import Transport, Verdict, open_transport
from agx_sidecar.traces.spans import spans_of

SPANS = spans_of(ended("run-1"))
STATUS = {
    400: Verdict.REFUSED,
    401: Verdict.UNAVAILABLE,
    403: Verdict.UNAVAILABLE,
    429: Verdict.UNAVAILABLE,
    500: Verdict.FAILED,
    503: Verdict.UNAVAILABLE,
}


def settings(protocol: str, timeout: str = "1") -> Settings:
    return read_settings({"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_EXPORTER_OTLP_TIMEOUT": timeout})


@pytest.fixture(params=["http/protobuf", "grpc"])
def transport(
    request: pytest.FixtureRequest, otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Transport]:
    """A transport of each protocol."""
    endpoint = otlp.endpoint_http if request.param == "http/protobuf" else otlp.endpoint_grpc
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    opened = open_transport(settings(request.param))
    yield opened
    opened.close()


def test_what_is_taken_is_said_to_be_taken(transport: Transport, otlp: OtlpReceiver) -> None:
    for _ in range(2):
        assert transport.send(SPANS).verdict is Verdict.TAKEN
    assert len(otlp.spans) == 2 * len(SPANS)


@pytest.mark.parametrize("rejected", [1, 2])
def test_what_is_rejected_of_a_batch_is_known(transport: Transport, otlp: OtlpReceiver, rejected: int) -> None:
    otlp.rejected = rejected
    answer = transport.send(SPANS)
    assert (answer.verdict, answer.rejected, answer.text) == (Verdict.TAKEN, rejected, "too old")
    otlp.rejected = 0
    assert transport.send(SPANS).rejected == 0


@pytest.mark.parametrize("status", STATUS)
def test_a_status_says_who_is_at_fault(transport: Transport, otlp: OtlpReceiver, status: int) -> None:
    otlp.fail_with(status)
    answer = transport.send(SPANS)
    assert answer.verdict is STATUS[status]
    assert answer.text
    otlp.recover()
    assert transport.send(SPANS).verdict is Verdict.TAKEN


def test_a_collector_that_is_not_there(transport: Transport, otlp: OtlpReceiver) -> None:
    otlp.__exit__()
    try:
        answer = transport.send(SPANS)
    finally:
        otlp.closing.clear()
        otlp.__enter__()
    assert answer.verdict is Verdict.UNAVAILABLE
    assert "refused" in answer.text or "UNAVAILABLE" in answer.text


@pytest.mark.parametrize("stall", ["drip", "hang"])
def test_a_request_is_cut_off_from_another_thread(
    otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, stall: Literal["drip", "hang"]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint_http)
    otlp.stall = stall
    transport = open_transport(settings("http/protobuf", timeout="30"))
    answers: list[Verdict] = []
    sending = threading.Thread(target=lambda: answers.append(transport.send(SPANS).verdict))
    sending.start()
    wait_until_sync(lambda: otlp.exports)
    transport.cut()
    sending.join(20)
    assert answers == [Verdict.UNAVAILABLE]
    transport.close()


@pytest.mark.parametrize("stall", ["drip", "hang"])
def test_a_collector_that_never_finishes_an_answer_counts_as_down(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver, stall: Literal["drip", "hang"]
) -> None:
    otlp.stall = stall
    queue.add(ended("run-1"))
    replica = start_replica(OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http, OTEL_EXPORTER_OTLP_TIMEOUT="0.5")
    assert replica.scrape().get("agx_export_last_success_timestamp_seconds") == 0
    wait_until_sync(lambda: "the collector takes no spans" in replica.log)
    assert replica.scrape().get("agx_spans_exported_total") == 0
    otlp.stall = ""
    wait_until_sync(lambda: otlp.spans)
    wait_until_sync(lambda: "the collector takes spans again" in replica.log)


@pytest.mark.parametrize("stall", ["drip", "hang"])
def test_sigterm_is_not_held_up_by_an_answer_that_never_ends(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver, stall: Literal["drip", "hang"]
) -> None:
    otlp.stall = stall
    queue.add(ended("run-1"))
    replica = start_replica(
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http, OTEL_EXPORTER_OTLP_TIMEOUT="600", AGX_DRAIN="1"
    )
    wait_until_sync(lambda: otlp.exports)
    assert replica.end() == 0, replica.log
    assert "it stays pending for another replica" in replica.log
    assert "Traceback" not in replica.log
