"""Each alert fires and resolves through a real Alertmanager (`make ops-check`).

Time is scaled down: a minute is a second, and nothing lasts longer than 40 s. promtool proves the real windows.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ops.boards import RULES, rules
from support.waiting import wait_until_sync

from dashboards.preview.stack import Stack, deployed_config, start_alertmanager, start_prometheus

pytestmark = [pytest.mark.alertmanager, pytest.mark.timeout(600)]

ALERTS = {rule["alert"] for rule in rules() if "alert" in rule}
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
SCRAPE = 0.5  # seconds
LONGEST = 40.0  # seconds, of a scaled window
REAL = "agx-sidecar"  # has everything but what follows
SILENT = "agx-sidecar-silent"  # its only sidecar ends
LEADERLESS = "agx-sidecar-leaderless"
RUN = 'agx_runs_total{scope="1",agent="bad",outcome="%s"}'
FIRST_CHUNK = "gen_ai_client_operation_time_to_first_chunk_seconds"
CHUNK = FIRST_CHUNK + '_%s{gen_ai_request_model="slow"%s}'
CANCEL = 'agx_cancel_latency_seconds_bucket{stage="call_tools",le="%s"}'

# What grows by how much in a second while all is well, and what more while it is not.
WELL = {
    RUN % "completed": 8.0,
    RUN % "failed": 0.0,
    RUN % "lost": 0.0,
    'agx_run_resumes_total{agent="bad"}': 0.0,
    'agx_job_attempts_exhausted_total{agent="bad"}': 0.0,
    'agx_tokens_total{scope="1",agent="bad",model="slow",type="input"}': 10.0,
    'agx_stream_append_failures_total{scope="1"}': 0.0,
    'agx_cost_unpriced_total{model="slow"}': 0.0,
    'agx_queue_trimmed_total{partition="0",sink="metrics"}': 0.0,
    CHUNK % ("bucket", ',le="5.12"'): 5.0,
    CHUNK % ("bucket", ',le="10.24"'): 5.0,
    CHUNK % ("bucket", ',le="+Inf"'): 5.0,
    CHUNK % ("count", ""): 5.0,
    CANCEL % "1.28": 5.0,
    CANCEL % "5.12": 5.0,
    CANCEL % "+Inf": 5.0,
}
ILL = {name: 1.0 for name, rate in WELL.items() if rate == 0} | {
    'agx_tokens_total{scope="1",agent="bad",model="slow",type="input"}': 1_000.0,
    CHUNK % ("bucket", ',le="5.12"'): 0.0,
    CANCEL % "1.28": 0.0,
}


def scaled(text: str) -> str:
    """Return rules whose windows, offsets and `for` are scaled down."""

    def shorten(found: re.Match[str]) -> str:
        seconds = int(found[2]) * SECONDS[found[3]]
        return f"{found[1]}{round(min(max(seconds / 60, 1.0), LONGEST) * 1_000)}ms{found[4]}"

    return re.sub(r"(\[|offset |for: )(\d+)([smhd])(\]?)", shorten, text)


class World:
    """What the sidecars would export; `is_ill` decides how it goes on."""

    def __init__(self) -> None:
        self.is_ill = False
        self._counters = dict.fromkeys(WELL, 0.0)
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def page(self, path: str) -> str | None:
        """Return what a target answers; None where it does not."""
        build = 'agx_build_info{version="1"} 1\n'
        ill = self.is_ill
        if path in ("/second", "/silent"):
            return None if ill else build
        if path == "/leaderless":
            return f"{build}agx_sidecar_leader {int(not ill)}\n"
        now = time.time()
        gauges = {
            "agx_sidecar_leader": 1,
            'agx_jobs_waiting{scope="1"}': 3 * ill,
            'agx_run_silence_seconds{service="web"}': 400 * ill,
            'agx_queue_lag_seconds{partition="0",sink="traces"}': 200 * ill,
            "agx_export_last_success_timestamp_seconds": now - 300 * ill,
        }
        lines = [f"{name} {value}\n" for name, value in {**self._advance(ill), **gauges}.items()]
        return build + "".join(lines)

    def _advance(self, ill: bool) -> dict[str, int]:
        with self._lock:
            now = time.monotonic()
            for name, rate in WELL.items():
                self._counters[name] += (now - self._last) * (ILL.get(name, rate) if ill else rate)
            self._last = now
            return {name: int(value) for name, value in self._counters.items()}


class Notices:
    """What Alertmanager sent: alerts by name and status."""

    def __init__(self) -> None:
        self.alerts: dict[tuple[str, str], dict[str, Any]] = {}

    def take(self, body: bytes) -> None:
        for alert in json.loads(body)["alerts"]:
            self.alerts[alert["labels"]["alertname"], alert["status"]] = alert

    def names(self, status: str) -> set[str]:
        return {name for name, known in list(self.alerts) if known == status}


@contextmanager
def serving(world: World, notices: Notices) -> Iterator[int]:
    """Serve the targets' pages and the webhook; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = world.page(self.path)
            self._answer(200 if page is not None else 503, (page or "").encode())

        def do_POST(self) -> None:
            notices.take(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(200, b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def prometheus_config(port: int, alertmanager: str, rule_file: Path) -> dict[str, Any]:
    config = deployed_config(SCRAPE)
    (deployed,) = config["scrape_configs"]
    targets = {REAL: ("/first", "/second"), SILENT: ("/silent",), LEADERLESS: ("/leaderless",)}
    # One server has all targets: its path is a label of the target, as `instance` is.
    relabel = [
        {"source_labels": ["path"], "target_label": "__metrics_path__"},
        {"source_labels": ["path"], "target_label": "instance"},
        {"regex": "path", "action": "labeldrop"},
    ]
    config["scrape_configs"] = [
        deployed
        | {
            "job_name": job,
            "relabel_configs": relabel,
            "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"path": path}} for path in paths],
        }
        for job, paths in targets.items()
    ]
    config["rule_files"] = [str(rule_file)]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return config


def test_each_alert_fires_and_resolves(tmp_path: Path) -> None:
    world, notices = World(), Notices()
    rule_file = tmp_path / "agx.rules.yaml"
    rule_file.write_text(scaled(RULES.read_text()))
    with ExitStack() as cleanup:
        port = cleanup.enter_context(serving(world, notices))
        alertmanager = start_alertmanager(cleanup, tmp_path, f"http://127.0.0.1:{port}/webhook")
        prometheus = start_prometheus(cleanup, tmp_path, prometheus_config(port, alertmanager, rule_file))
        print(f"Prometheus: {prometheus}, Alertmanager: http://{alertmanager}")
        parts = Stack("", (), prometheus)
        wait_until_sync(lambda: parts.query(scaled("agx:tokens:rate1h offset 1d")), timeout=LONGEST + 30)
        assert notices.names("firing") == set()
        world.is_ill = True
        wait_for(notices, "firing")
        for name in ALERTS:
            annotations = notices.alerts[name, "firing"]["annotations"]
            print(f"{name}: {annotations['summary']}")
            assert not re.search(r"<no value>|<nil>|NaN|error calling", " ".join(annotations.values())), annotations
        world.is_ill = False
        wait_for(notices, "resolved")


def wait_for(notices: Notices, status: str) -> None:
    try:
        wait_until_sync(lambda: notices.names(status) >= ALERTS, timeout=150)
    except BaseException:
        print(f"not {status}: {sorted(ALERTS - notices.names(status))}")
        raise
    assert notices.names(status) == ALERTS
