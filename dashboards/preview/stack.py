"""The real parts after the boards, on loopback: a server, two sidecars, a Prometheus with our rules, a collector.

Prometheus runs with the file of compose.yaml, its addresses and intervals replaced.
"""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agx.embedded.child import Child, draw_ports
from agx.embedded.server import EmbeddedServer
from agx.errors import AgxError
from agx.facts.schema import ERROR_OUTCOMES
from agx.telemetry import conventions as c

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards" / "rules" / "agx.rules.yaml"
SCRAPE_FILE = ROOT / "deploy" / "prometheus.yml"
Launch = tuple[list[str], dict[str, str]]  # a command, and its environment beyond our own
_PORT_DRAWS = 3
_START = 30.0  # seconds
_POLL = 0.05


class StackError(AgxError):
    """Raised where one of the parts is missing or does not come up."""


@dataclass(frozen=True, slots=True)
class Stack:
    """What is running: the server's URL, the sidecars' addresses, and Prometheus' API."""

    redis_url: str
    sidecars: tuple[str, ...]
    prometheus: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the result of an instant query."""
        return self._get("query", query=expr)

    def bad_runs(self) -> list[dict[str, str]]:
        """Return the columns of the last runs that failed or were lost, as a data source for traces names them."""
        return list(_Collector.runs)

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the result of a range query; seconds since the epoch."""
        return self._get("query_range", query=expr, start=str(start), end=str(end), step=str(step))

    def _get(self, what: str, **parameters: str) -> list[dict[str, Any]]:
        # On loopback there is nothing to verify, and loading the authorities takes longer than the query.
        reply = httpx.post(f"{self.prometheus}/api/v1/{what}", data=parameters, timeout=10, verify=False).json()  # noqa: S501
        if reply["status"] != "success":
            raise StackError(f"{reply['error']} in {parameters['query']}")
        result: list[dict[str, Any]] = reply["data"]["result"]
        return result


@contextmanager
def running(*, scrape: float = 1.0) -> Iterator[Stack]:
    """Start everything; `scrape` is Prometheus' interval in seconds.

    Raises:
        StackError: there is no `prometheus` on the PATH, or a part does not come up; its log is in the message.
    """
    with ExitStack() as cleanup:
        home = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="agx-boards-")))
        server = cleanup.enter_context(EmbeddedServer())
        collector = cleanup.enter_context(_collector())
        sidecars = tuple(_sidecar(cleanup, home, server.url, collector) for _ in range(2))
        prometheus = start_prometheus(cleanup, home, _boards_config(sidecars, scrape))
        yield Stack(server.url, sidecars, prometheus)


def _sidecar(cleanup: ExitStack, home: Path, redis_url: str, collector: str) -> str:
    settings = {
        "AGX_REDIS_URL": redis_url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    return _start(
        cleanup,
        home,
        lambda port: ([sys.executable, "-m", "agx_sidecar"], settings | {"AGX_HTTP_PORT": str(port)}),
        "/healthz",
    )


def _boards_config(sidecars: tuple[str, ...], scrape: float) -> dict[str, Any]:
    config = deployed_config(scrape)
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": list(sidecars)}]
    return config


def deployed_config(scrape: float) -> dict[str, Any]:
    """Return the configuration of compose.yaml's Prometheus, every `scrape` seconds, without targets and rules."""
    config: dict[str, Any] = yaml.safe_load(SCRAPE_FILE.read_text())
    interval = f"{round(scrape * 1000)}ms"
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    del config["rule_files"]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    return config


def start_prometheus(cleanup: ExitStack, home: Path, config: dict[str, Any]) -> str:
    """Start a Prometheus that ends with `cleanup`, and return its URL.

    Raises:
        StackError: there is no `prometheus` on the PATH, or it does not come up; its log is in the message.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        raise StackError("there is no prometheus on the PATH: install it (Debian: apt install prometheus)")
    path = home / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    command = [
        binary,
        f"--config.file={path}",
        f"--storage.tsdb.path={home / 'tsdb'}",
        "--enable-feature=exemplar-storage",
    ]
    address = _start(cleanup, home, lambda port: ([*command, f"--web.listen-address=127.0.0.1:{port}"], {}), "/-/ready")
    return f"http://{address}"


def start_alertmanager(cleanup: ExitStack, home: Path, webhook: str) -> str:
    """Start an Alertmanager that posts each alert to `webhook` at once, and return its address.

    Raises:
        StackError: there is no `prometheus-alertmanager` on the PATH, or it does not come up.
    """
    binary = shutil.which("prometheus-alertmanager")
    if binary is None:
        raise StackError(
            "there is no prometheus-alertmanager on the PATH (Debian: apt install prometheus-alertmanager)"
        )
    path = home / "alertmanager.yml"
    route = {
        "receiver": "here",
        "group_by": ["..."],
        "group_wait": "0s",
        "group_interval": "1s",
        "repeat_interval": "1h",
    }
    receiver = {"name": "here", "webhook_configs": [{"url": webhook, "send_resolved": True}]}
    path.write_text(yaml.safe_dump({"route": route, "receivers": [receiver]}))
    command = [binary, f"--config.file={path}", f"--storage.path={home / 'alertmanager'}", "--cluster.listen-address="]
    return _start(cleanup, home, lambda port: ([*command, f"--web.listen-address=127.0.0.1:{port}"], {}), "/-/ready")


def _start(cleanup: ExitStack, home: Path, on_port: Callable[[int], Launch], ready: str) -> str:
    """Start a part on the first port of a few that is free, wait until it answers, and return its address."""
    output = ""
    for port in draw_ports(_PORT_DRAWS):
        own = Path(tempfile.mkdtemp(dir=home))
        log = own / "log"
        command, settings = on_port(port)
        child = Child(command, log=log, home=own, environment={**os.environ, **settings})
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and not child.ended:
            if _answers(f"http://127.0.0.1:{port}{ready}"):
                cleanup.callback(child.end, signal.SIGTERM)
                return f"127.0.0.1:{port}"
            time.sleep(_POLL)
        child.end(signal.SIGKILL)
        output = log.read_text()[-2000:]
    raise StackError(f"a part did not come up; its log ends:\n{output}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).is_success
    except httpx.HTTPError:
        return False


class _Collector(BaseHTTPRequestHandler):
    """An OTLP collector that takes everything and keeps the last runs that failed or were lost."""

    runs: ClassVar[deque[dict[str, str]]] = deque(maxlen=20)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        zipped = self.headers.get("Content-Encoding") == "gzip"
        request = ExportTraceServiceRequest.FromString(gzip.decompress(body) if zipped else body)
        for resource in request.resource_spans:
            service = {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"]
            for span in (span for scope in resource.scope_spans for span in scope.spans if span.name == "agx.stream"):
                row = {each.key: each.value.string_value for each in span.attributes}
                if row[c.RUN_OUTCOME] in ERROR_OUTCOMES:
                    begun = time.strftime("%H:%M:%S", time.gmtime(span.start_time_unix_nano / 1e9))
                    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
                    row |= {"time": begun, "traceService": service, "duration": f"{seconds:.1f} s"}
                    self.runs.appendleft(row)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _collector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
