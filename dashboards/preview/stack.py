"""The real parts behind the boards, on loopback: a server, two sidecars, a Prometheus with our rules, a collector.

Prometheus runs with the file of compose.yaml, its addresses and intervals replaced.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from agx.child import Child, draw_ports
from agx.errors import AgxError
from agx.server import EmbeddedServer

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards" / "rules" / "agx.rules.yaml"
SCRAPE_FILE = ROOT / "deploy" / "prometheus.yml"
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

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the result of a range query; seconds since the epoch."""
        return self._get("query_range", query=expr, start=str(start), end=str(end), step=str(step))

    def _get(self, what: str, **parameters: str) -> list[dict[str, Any]]:
        reply = httpx.post(f"{self.prometheus}/api/v1/{what}", data=parameters, timeout=10).json()
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
        prometheus = _prometheus(cleanup, home, sidecars, scrape)
        yield Stack(server.url, sidecars, prometheus)


def _sidecar(cleanup: ExitStack, home: Path, redis_url: str, collector: str) -> str:
    port = draw_ports(1)[0]
    settings = {
        "AGX_REDIS_URL": redis_url,
        "AGX_HTTP_PORT": str(port),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    _start(cleanup, home, [sys.executable, "-m", "agx_sidecar"], f"http://127.0.0.1:{port}/healthz", settings)
    return f"127.0.0.1:{port}"


def _prometheus(cleanup: ExitStack, home: Path, sidecars: tuple[str, ...], scrape: float) -> str:
    binary = shutil.which("prometheus")
    if binary is None:
        raise StackError("there is no prometheus on the PATH: install it (Debian: apt install prometheus)")
    config = yaml.safe_load(SCRAPE_FILE.read_text())
    interval = f"{round(scrape * 1000)}ms"
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": list(sidecars)}]
    path = home / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    port = draw_ports(1)[0]
    command = [
        binary,
        f"--config.file={path}",
        f"--storage.tsdb.path={home / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    _start(cleanup, home, command, f"http://127.0.0.1:{port}/-/ready", {})
    return f"http://127.0.0.1:{port}"


def _start(cleanup: ExitStack, home: Path, command: list[str], ready: str, settings: dict[str, str]) -> None:
    own = Path(tempfile.mkdtemp(dir=home))
    log = own / "log"
    child = Child(command, log=log, home=own, environment={**os.environ, **settings})
    cleanup.callback(child.end, signal.SIGTERM)
    deadline = time.monotonic() + _START
    while not _answers(ready):
        if child.ended or time.monotonic() > deadline:
            raise StackError(f"{command[0]} did not come up; its log ends:\n{log.read_text()[-2000:]}")
        time.sleep(_POLL)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).is_success
    except httpx.HTTPError:
        return False


class _Accept(BaseHTTPRequestHandler):
    """An OTLP collector that takes everything and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _collector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Accept)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
