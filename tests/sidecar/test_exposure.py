"""What strangers may see of a sidecar: its numbers, and neither ids, nor content, nor secrets."""

from __future__ import annotations

from support.made_facts import ended, heartbeat, node, started, tool
from support.otlp import OtlpReceiver
from support.replica import Queue, StartReplica
from support.waiting import wait_until_sync

SECRET = "xyzzy-secret"
OPENMETRICS = {"Accept": "application/openmetrics-text"}


def test_metrics_carry_no_ids_and_no_content(queue: Queue, start_replica: StartReplica) -> None:
    of_run = {"user": f"{SECRET}-user", "session": f"{SECRET}-session"}
    run_id = f"{SECRET}-run"
    queue.add(
        started(run_id, **of_run),
        node(run_id, outcome="failed", error_type="app.BoomError", **of_run),
        tool(run_id, call_id=f"{SECRET}-call", outcome="error", error_type="app.BoomError", **of_run),
        ended(run_id, outcome="failed", error_type="app.BoomError", error_message=f"{SECRET} message", **of_run),
        heartbeat(),
    )
    replica = start_replica()
    wait_until_sync(lambda: replica.scrape().total("agx_run_errors_total", error_type="app.BoomError") == 1)
    for headers in ({}, OPENMETRICS):
        assert SECRET not in replica.get("/metrics", **headers)[1]
    assert (
        "trace_id" in replica.get("/metrics", **OPENMETRICS)[1]
    )  # the exemplar leads to the trace, for who may see it
    assert SECRET not in replica.log


def test_secrets_are_in_no_log_and_on_no_page(start_sidecar: StartReplica) -> None:
    """Neither where everything fails, nor at the level that says most."""
    with OtlpReceiver() as otlp:
        otlp.fail_with(401)
        replica = start_sidecar(
            f"redis://{SECRET}-user:{SECRET}-password@127.0.0.1:1/0",
            AGX_LOG_LEVEL="DEBUG",
            AGX_CONSOLE="full",
            AGX_CONSOLE_PORT="0",
            AGX_CONSOLE_TOKEN=f"{SECRET}-token",
            OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http,
            OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {SECRET}-header",
        )
        wait_until_sync(lambda: replica.get("/readyz")[0] == 503)
        wait_until_sync(lambda: "Redis can't be reached" in replica.log)
        pages = [replica.get(path)[1] for path in ("/readyz", "/healthz", "/metrics", "/nowhere")]
        assert replica.end() == 0
    assert "127.0.0.1:1" in replica.log  # the address is said
    assert SECRET not in replica.log
    assert not [page for page in pages if SECRET in page]


def test_a_collector_that_refuses_us_is_not_told_of_with_our_header(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    otlp.fail_with(401)
    queue.add(ended("run-1"), ended("run-2"))
    replica = start_replica(
        AGX_LOG_LEVEL="DEBUG",
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http,
        OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {SECRET}",
    )
    wait_until_sync(lambda: "the collector takes no spans" in replica.log)
    assert otlp.exports[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in replica.log
