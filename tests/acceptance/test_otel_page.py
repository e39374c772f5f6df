"""docs/how-to/otel.md: its service without an SDK, with one and with Logfire, and what a collector gets of each."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.docs import code_blocks
from support.model_server import MODEL, ModelServer, call, say
from support.otlp import OtlpReceiver, ReceivedSpan
from support.terminals import Terminals
from support.waiting import wait_until_sync

from agx.child import draw_ports

PAGE = "how-to/otel.md"
SERVICE, WITH_SDK, WITH_LOGFIRE = code_blocks(PAGE, "python")
INSTALL, SIDECAR, PLAIN, SDK, LOGFIRE, CONTENT, EXEMPLARS = code_blocks(PAGE, "bash")
PLAIN_TREE, SDK_TREE = code_blocks(PAGE, "text")
SECRET = "parcel-at-the-harbour"


class Orders(BaseHTTPRequestHandler):
    """The service that the page's tool asks; it keeps the traceparents it got."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers["traceparent"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SECRET.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def orders() -> Iterator[tuple[str, list[str]]]:
    """The orders service's address, and the traceparents that came."""
    seen: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("_", (Orders,), {"seen": seen})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


class Host(Terminals):
    """Where the page's service and the sidecar run."""

    def __init__(self, home: Path, redis_url: str, model: ModelServer, orders: str, otlp: OtlpReceiver) -> None:
        for name, block in {"assistant": SERVICE, "with_sdk": WITH_SDK, "with_logfire": WITH_LOGFIRE}.items():
            (home / f"{name}.py").write_text(block)
        (self.port,) = draw_ports(1)
        super().__init__(
            home,
            {
                "REDIS_URL": redis_url,
                "AGX_REDIS_URL": redis_url,
                "AGX_HTTP_PORT": str(self.port),
                "MODEL": f"openai-chat:{MODEL}",
                "OPENAI_BASE_URL": model.base_url,
                "ORDERS": orders,
            },
        )
        self.otlp = otlp
        self._model = model
        self.keep_running(self.sent_here(SIDECAR))

    def sent_here(self, block: str) -> str:
        return block.replace("http://localhost:4318", self.otlp.endpoint_http)

    def serve(self, block: str) -> list[ReceivedSpan]:
        """Run the service; return the spans, once the sidecar's last one is there."""
        self._model.script(call("look_up", '{"order": 7}'), say(f"It is: {SECRET}"))
        assert SECRET in self.run(self.sent_here(block))
        wait_until_sync(lambda: any(span.name == "agx.stream" for span in self.otlp.spans), what="the sidecar's span")
        return self.otlp.spans


@pytest.fixture
def host(
    redis_url: str, model_server: ModelServer, tmp_path: Path, orders: tuple[str, list[str]], otlp: OtlpReceiver
) -> Iterator[Host]:
    with Host(tmp_path, redis_url, model_server, orders[0], otlp) as host:
        yield host


def tree(spans: list[ReceivedSpan]) -> str:
    """Write a trace as the page does."""
    lines: list[str] = []

    def add(parent: str | None, depth: int) -> None:
        # `agx.stream` lasts as long as the run, and the page has it last.
        below = [span for span in spans if span.parent_span_id == parent]
        for span in sorted(below, key=lambda span: (span.name == "agx.stream", span.start_ns)):
            lines.append(f"{'  ' * depth}{span.name}\n")
            add(span.span_id, depth + 1)

    add(None, 0)
    assert len(lines) == len(spans), "not all spans hang together"
    return "".join(lines)


def tool_of(spans: list[ReceivedSpan]) -> str:
    (tool,) = [span for span in spans if span.name == "execute_tool look_up"]
    return f"00-{tool.trace_id}-{tool.span_id}"


def test_without_an_sdk_the_sidecar_exports(host: Host, orders: tuple[str, list[str]]) -> None:
    spans = host.serve(PLAIN)
    assert tree(spans) == PLAIN_TREE
    assert {span.resource["service.name"] for span in spans} == {"assistant"}
    assert [sent.rpartition("-")[0] for sent in orders[1]] == [tool_of(spans)]
    assert SECRET not in repr(spans)

    # From a metric to its trace.
    said = wait_until_sync(lambda: host.run(EXEMPLARS.replace("9464", str(host.port))), what="an exemplar")
    assert set(re.findall(r'trace_id="(\w+)"', said)) == {spans[0].trace_id}


def test_with_an_sdk_the_spans_are_nested(host: Host, orders: tuple[str, list[str]]) -> None:
    spans = host.serve(SDK)
    assert tree(spans) == SDK_TREE
    assert {span.resource["service.name"] for span in spans} == {"assistant"}
    assert [sent.rpartition("-")[0] for sent in orders[1]] == [tool_of(spans)]
    assert SECRET not in repr(spans)


def test_content_is_there_when_it_is_asked_for(host: Host) -> None:
    spans = host.serve(CONTENT + SDK)
    assert {span.name.split(" ")[0] for span in spans if SECRET in repr(span)} >= {"chat", "execute_tool"}


def test_logfire_is_an_sdk(host: Host) -> None:
    host.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": host.otlp.endpoint_http,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "LOGFIRE_CONSOLE": "false",
    }
    spans = host.serve(LOGFIRE)
    assert tree(spans) == SDK_TREE
    assert SECRET not in repr(spans)


def test_the_install_line(tmp_path: Path) -> None:
    with Terminals(tmp_path, {}) as terminals:
        terminals.check_install(INSTALL)
