"""A collector that is not ours reads the sidecar's spans: rotel, in Rust, over HTTP and gRPC."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.made_facts import CHAT_SPAN, RUN_SPAN, TOOL_SPAN, TRACE_ID, ended, node, started, tool
from support.replica import Queue, StartReplica
from support.waiting import wait_until_sync

from agx.embedded.child import Child, draw_ports
from agx.facts.schema import stream_span_id

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Rotel:
    """A running rotel that drops what it gets and prints it."""

    def __init__(self, home: Path, http_port: int, grpc_port: int) -> None:
        self.endpoints = {"http/protobuf": f"http://127.0.0.1:{http_port}", "grpc": f"http://127.0.0.1:{grpc_port}"}
        self._log = home / "log"
        spec = find_spec("rotel")
        assert spec is not None
        assert spec.origin is not None
        self.child = Child(
            [
                str(Path(spec.origin).parent / "rotel-agent"),
                *("start", "--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed"),
                *("--otlp-http-endpoint", f"127.0.0.1:{http_port}", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}"),
                *("--pid-file", str(home / "pid"), "--log-file", str(home / "agent.log")),
            ],
            log=self._log,
            home=home,
        )

    @property
    def said(self) -> str:
        return _COLOURS.sub("", self._log.read_text(errors="replace"))


@pytest.fixture
def rotel() -> Iterator[Rotel]:
    home = Path(tempfile.mkdtemp(prefix="agx-rotel-"))
    agent = Rotel(home, *draw_ports(2))
    wait_until_sync(lambda: "Starting Rotel" in agent.said and not agent.child.ended, what="rotel starts")
    yield agent
    agent.child.end()
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_foreign_collector_reads_a_whole_trace(
    queue: Queue, start_replica: StartReplica, rotel: Rotel, protocol: str
) -> None:
    queue.add(started(), node(), tool(), ended(outcome="failed", error_type="ModelHTTPError", events_between=7))
    replica = start_replica(
        OTEL_EXPORTER_OTLP_ENDPOINT=rotel.endpoints[protocol],
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
    )
    wait_until_sync(lambda: replica.scrape().get("agx_spans_exported_total") == 4)
    said = wait_until_sync(lambda: rotel.said if "agx.stream" in rotel.said else "")
    assert TRACE_ID in said
    for span_id in (RUN_SPAN, CHAT_SPAN, TOOL_SPAN, stream_span_id("run-1")):
        assert span_id in said
    for text in (
        "invoke_agent support",
        "chat gpt-4o-mini",
        "execute_tool lookup",
        "gen_ai.usage.input_tokens",
        "shop",
    ):
        assert text in said
    assert replica.log.count("WARNING") == 0
