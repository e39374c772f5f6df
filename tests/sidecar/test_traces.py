"""Facts to spans at a real collector, over HTTP and gRPC, through outages, refusals and deaths of replicas."""

from __future__ import annotations

import signal
from functools import partial

import pytest
from redis import Redis
from support.leaks import leak_checked
from support.made_facts import CHAT_SPAN, RUN_SPAN, TOOL_SPAN, TRACE_ID, ended, node, started, tool, trace
from support.otlp import OtlpReceiver, ReceivedSpan
from support.replica import Queue, Replica, StartReplica
from support.waiting import wait_until_sync

from agx.embedded.server import EmbeddedServer
from agx.facts.schema import Fact, StreamEvent, stream_span_id
from agx.redis import keys
from agx_sidecar.source import TRACES_GROUP
from agx_sidecar.traces.spans import spans_of


def a_run(run_id: str) -> list[Fact]:
    return [started(run_id), node(run_id), tool(run_id), ended(run_id)]


def over_http(otlp: OtlpReceiver) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint_http}


def over_grpc(otlp: OtlpReceiver) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint_grpc, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}


def by_run(spans: list[ReceivedSpan]) -> dict[str, set[str]]:
    """The names of the spans of each run."""
    runs: dict[str, set[str]] = {}
    for span in spans:
        runs.setdefault(str(span.attributes["agx.run.id"]), set()).add(span.name)
    return runs


def pending(queue: Queue) -> int:
    return sum(
        int(group["pending"])
        for n in range(queue.partitions)
        if queue.redis.exists(keys.queue("agx", n))
        for group in queue.redis.xinfo_groups(keys.queue("agx", n))
    )


WHOLE = {"invoke_agent support", "chat gpt-4o-mini", "execute_tool lookup", "agx.stream"}


@pytest.mark.parametrize("protocol", [over_http, over_grpc])
def test_a_run_becomes_one_trace(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver, protocol: object
) -> None:
    assert callable(protocol)
    queue.add(*a_run("run-1"))
    replica = start_replica(**protocol(otlp))
    wait_until_sync(lambda: len(otlp.spans) == 4)
    spans = {span.name: span for span in otlp.spans}
    assert set(spans) == WHOLE
    assert {span.trace_id for span in spans.values()} == {TRACE_ID}
    assert {name: (span.span_id, span.parent_span_id) for name, span in spans.items()} == {
        "invoke_agent support": (RUN_SPAN, None),
        "chat gpt-4o-mini": (CHAT_SPAN, RUN_SPAN),
        "execute_tool lookup": (TOOL_SPAN, RUN_SPAN),
        "agx.stream": (stream_span_id("run-1"), RUN_SPAN),
    }
    assert {str(span.resource["service.name"]) for span in spans.values()} == {"shop"}
    assert [event.name for event in spans["agx.stream"].events] == ["begin", "part", "end"]
    wait_until_sync(lambda: pending(queue) == 0)
    seen = wait_until_sync(lambda: s if (s := replica.scrape()).get("agx_spans_exported_total") == 4 else None)
    assert seen.get("agx_spans_failed_total") == 0
    assert (seen.get("agx_export_last_success_timestamp_seconds") or 0) > 1.7e9
    wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == 1)
    assert replica.end() == 0, replica.log


def test_a_service_with_an_sdk_gets_only_the_stream_span(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    sdk = {"trace": trace(sdk=True)}
    queue.add(started(**sdk), node(**sdk), tool(**sdk), ended(**sdk))
    queue.add(ended("run-2", trace=trace(sampled=False)), ended("run-3"))
    start_replica(**over_http(otlp))
    wait_until_sync(lambda: "run-3" in by_run(otlp.spans))
    assert by_run(otlp.spans) == {"run-1": {"agx.stream"}, "run-3": {"invoke_agent support", "agx.stream"}}


@pytest.mark.parametrize("status", [500, 503])
def test_a_collector_that_is_down_stops_no_metrics_and_gets_all_spans_afterwards(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver, status: int
) -> None:
    otlp.fail_with(status)
    replica = start_replica(**over_http(otlp), OTEL_EXPORTER_OTLP_TIMEOUT="1")
    queue.add(*(fact for n in range(40) for fact in a_run(f"run-{n}")))
    wait_until_sync(lambda: "the collector takes no spans" in replica.log)
    seen = wait_until_sync(lambda: s if (s := replica.scrape()).total("agx_runs_total") == 40 else None)
    assert seen.get("agx_spans_exported_total") == 0
    wait_until_sync(lambda: replica.scrape().total("agx_queue_length", sink="traces") > 0)
    otlp.recover()
    wait_until_sync(
        lambda: len(by_run(otlp.spans)) == 40 and set(map(frozenset, by_run(otlp.spans).values())) == {frozenset(WHOLE)}
    )
    assert replica.scrape().get("agx_spans_failed_total") == 0
    assert replica.log.count("the collector takes no spans") == 1
    assert "the collector takes spans again" in replica.log
    wait_until_sync(lambda: pending(queue) == 0)
    wait_until_sync(lambda: replica.scrape().total("agx_queue_length", sink="traces") == 0)


def test_a_fact_that_the_collector_refuses_is_dropped(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    otlp.fail_with(400, when=lambda span: span.attributes.get("agx.run.id") == "poison")
    queue.add(*(fact for n in range(5) for fact in a_run(f"run-{n}")), ended("poison"))
    queue.add(*(fact for n in range(5, 9) for fact in a_run(f"run-{n}")))
    replica = start_replica(**over_http(otlp))
    wait_until_sync(lambda: replica.scrape().get("agx_spans_failed_total") == 2)
    wait_until_sync(lambda: len(by_run(otlp.spans)) == 9)
    assert "poison:end" in replica.log
    assert "takes no spans" not in replica.log
    wait_until_sync(lambda: pending(queue) == 0)


def test_a_fact_at_which_the_collector_fails_waits_until_it_takes_another(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    otlp.fail_with(500, when=lambda span: span.attributes.get("agx.run.id") == "poison")
    queue.add(ended("poison"))
    replica = start_replica(**over_http(otlp))
    wait_until_sync(lambda: "the collector takes no spans" in replica.log)
    assert replica.scrape().get("agx_spans_failed_total") == 0
    queue.add(*a_run("run-1"))
    wait_until_sync(lambda: replica.scrape().get("agx_spans_failed_total") == 2)
    wait_until_sync(lambda: by_run(otlp.spans).get("run-1") == WHOLE)
    wait_until_sync(lambda: pending(queue) == 0)


def test_pending_facts_of_a_killed_replica_are_taken_over(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    otlp.fail_with(503)
    first = start_replica(**over_http(otlp))
    queue.add(*(fact for n in range(20) for fact in a_run(f"run-{n}")))
    wait_until_sync(lambda: pending(queue) > 0)
    first.end(signal.SIGKILL)
    otlp.recover()
    start_replica(**over_http(otlp))
    wait_until_sync(lambda: by_run(otlp.spans) == {f"run-{n}": WHOLE for n in range(20)})
    wait_until_sync(lambda: pending(queue) == 0)


def test_two_replicas_share_the_work_and_export_everything_once(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    both = [start_replica(**over_http(otlp)), start_replica(**over_http(otlp))]
    wait_until_sync(lambda: all(replica.get("/readyz")[0] == 200 for replica in both))
    for n in range(50):
        queue.add(*a_run(f"run-{n}"))
    wait_until_sync(lambda: by_run(otlp.spans) == {f"run-{n}": WHOLE for n in range(50)})
    assert len(otlp.spans) == 200
    assert [replica.end() for replica in both] == [0, 0]


def test_sigterm_exports_what_was_read_and_leaves_no_consumer(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    replica: Replica = start_replica(**over_http(otlp))
    facts = [fact for n in range(30) for fact in a_run(f"run-{n}")]
    queue.add(*facts)
    wait_until_sync(lambda: pending(queue) > 0 or otlp.spans)
    assert replica.end() == 0, replica.log
    read = queue.redis.xinfo_groups(queue.key(ended()))[0]["entries-read"]
    assert pending(queue) == 0
    assert len(otlp.spans) == sum(len(spans_of(fact)) for fact in facts[:read])
    assert queue.redis.xinfo_consumers(queue.key(ended()), TRACES_GROUP) == []


def test_sigterm_does_not_wait_for_a_dead_collector_longer_than_it_may(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    otlp.fail_with(503)
    replica = start_replica(**over_http(otlp), AGX_DRAIN="1")
    queue.add(*a_run("run-1"))
    wait_until_sync(lambda: otlp.exports)
    assert replica.end() == 0, replica.log
    assert "it stays pending for another replica" in replica.log
    assert pending(queue) > 0


def test_a_batch_is_cut_by_bytes(queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver) -> None:
    big = tuple(StreamEvent(n, "part_start", {"agx.note": "x" * 4_000}) for n in range(120))
    queue.add(*(ended(f"run-{n}", events=big) for n in range(40)))
    start_replica(**over_grpc(otlp))
    wait_until_sync(lambda: len(by_run(otlp.spans)) == 40)
    assert max(export.size for export in otlp.exports) < 4 * 1024 * 1024
    assert len(otlp.exports) >= 2


def test_a_queue_that_expired_and_came_back_gets_its_group_again(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    queue.add(*a_run("run-1"))
    replica = start_replica(**over_http(otlp))
    wait_until_sync(lambda: by_run(otlp.spans) == {"run-1": WHOLE})
    queue.redis.delete(queue.key(ended()))
    queue.add(*a_run("run-2"))
    wait_until_sync(lambda: by_run(otlp.spans).get("run-2") == WHOLE)
    assert replica.log.count("WARNING") <= 1  # the queue began anew


def test_traces_alone_count_malformed_facts_too(queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver) -> None:
    queue.add_raw([(keys.queue("agx", 0), b"nonsense")])
    replica = start_replica(**over_http(otlp), AGX_SINKS="traces")
    wait_until_sync(lambda: replica.scrape().get("agx_facts_malformed_total") == 1)
    wait_until_sync(lambda: pending(queue) == 0)
    assert not queue.redis.exists(keys.leader("agx"))


@pytest.mark.parametrize("name", ["server", pytest.param("redis7_server", marks=pytest.mark.redis7)])
def test_trims_before_delivery_are_counted(
    name: str, request: pytest.FixtureRequest, start_sidecar: StartReplica, otlp: OtlpReceiver
) -> None:
    """Valkey and Redis 7.0 count in different ways what a group has read."""
    server: EmbeddedServer = request.getfixturevalue(name)
    start_replica = partial(start_sidecar, server.url)
    with leak_checked(server.url) as url, Redis.from_url(url) as client:
        _check_trims(Queue(client), start_replica, otlp)


def _check_trims(queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver) -> None:
    queue.add(*a_run("run-1"))
    replica = start_replica(**over_http(otlp))
    wait_until_sync(lambda: by_run(otlp.spans) == {"run-1": WHOLE})
    wait_until_sync(lambda: replica.scrape().total("agx_queue_length", sink="traces") == 0)
    replica.end()
    queue.add(*(started(f"run-{n}") for n in range(50)))
    queue.redis.xtrim(queue.key(ended()), maxlen=10, approximate=False)
    metrics_only = start_replica(AGX_SINKS="metrics")
    wait_until_sync(lambda: metrics_only.scrape().total("agx_queue_trimmed_total", sink="traces") == 40)
    assert metrics_only.scrape().total("agx_queue_length", sink="traces") == 10
    start_replica(**over_http(otlp), AGX_SINKS="traces")
    wait_until_sync(lambda: metrics_only.scrape().total("agx_queue_length", sink="traces") == 0)
    assert metrics_only.scrape().total("agx_queue_trimmed_total", sink="traces") == 40
