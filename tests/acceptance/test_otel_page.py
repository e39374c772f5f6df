"""docs/how-to/otel.md: its service without an SDK, with one and with Logfire, and what a collector gets of each."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.docs import every_block
from support.model_server import ModelServer, call, say
from support.otlp import OtlpReceiver, ReceivedSpan
from support.terminals import Terminals
from support.waiting import wait_until_sync

from agx.embedded.child import draw_ports

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
    """Where the page's services and the sidecar run."""

    def __init__(self, home: Path, redis_url: str, model: ModelServer, orders: str, otlp: OtlpReceiver) -> None:
        (self.port,) = draw_ports(1)
        addresses = {"AGX_REDIS_URL": redis_url, "AGX_HTTP_PORT": str(self.port)}
        super().__init__(home, {**addresses, **model.environment, "ORDERS": orders})
        self.otlp = otlp
        self._model = model

    def sent_here(self, block: str) -> str:
        return block.replace("http://localhost:4318", self.otlp.endpoint_http)

    def serve(self, block: str) -> list[ReceivedSpan]:
        """Run the service; return its spans, once the sidecar's last one is there."""
        self.otlp.clear()
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


def test_every_block(host: Host, orders: tuple[str, list[str]]) -> None:
    with every_block("docs/how-to/otel.md") as page:
        host.run(page.take("bash", "pip install"))
        for name in ("assistant.py", "with_sdk.py", "with_logfire.py"):
            (host.home / name).write_text(page.take("python"))
        sidecar = host.sent_here(page.take("bash", "agx-sidecar"))
        child, _ = host.keep_running(sidecar, url=f"http://localhost:{host.port}/readyz")

        without_sdk = host.serve(page.take("bash", "python assistant.py"))
        look = page.take("bash", "curl").replace("9464", str(host.port))
        said = wait_until_sync(lambda: host.run(look), what="an exemplar")
        assert set(re.findall(r'trace_id="(\w+)"', said)) == {without_sdk[0].trace_id}

        is_the_trace_on_the_page(without_sdk, page.take("text"), orders[1])
        with_sdk, shown = page.take("bash", "python with_sdk.py"), page.take("text")
        is_the_trace_on_the_page(host.serve(with_sdk), shown, orders[1])

        spans = host.serve(page.take("bash", "CAPTURE_MESSAGE_CONTENT") + with_sdk)
        assert {span.name.split(" ")[0] for span in spans if SECRET in repr(span)} >= {"chat", "execute_tool"}
        orders[1].clear()

        host.environment |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": host.otlp.endpoint_http,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "LOGFIRE_CONSOLE": "false",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        is_the_trace_on_the_page(host.serve(page.take("bash", "python with_logfire.py")), shown, orders[1])

        host.interrupt(child)  # its port is the next sidecar's
        host.otlp.points.clear()
        host.keep_running(host.sent_here(page.take("bash", "AGX_METRICS_EXPORT")))
        wait_until_sync(lambda: any(point.name == "agx_runs_total" for point in host.otlp.points), what="a push")


def is_the_trace_on_the_page(spans: list[ReceivedSpan], shown: str, asked: list[str]) -> None:
    """`asked`: with which traceparents the tool asked; they are forgotten."""
    assert tree(spans) == shown
    assert {span.resource["service.name"] for span in spans} == {"assistant"}
    assert [traceparent.rpartition("-")[0] for traceparent in asked] == [tool_of(spans)]
    assert SECRET not in repr(spans)
    asked.clear()


def tool_of(spans: list[ReceivedSpan]) -> str:
    (tool,) = [span for span in spans if span.name == "execute_tool look_up"]
    return f"00-{tool.trace_id}-{tool.span_id}"
