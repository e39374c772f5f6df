"""The pages over real HTTP: formats, health that can fail, readiness with its reason; and the log."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from redis import Redis
from support.made_facts import ended, started
from support.replica import Queue, Replica, StartReplica
from support.waiting import wait_until_sync

from agx.embedded.server import EmbeddedServer


@pytest.fixture
def leader(queue: Queue, start_replica: StartReplica) -> Replica:
    """A replica that leads and has counted a run."""
    queue.add(started(), ended())
    replica = start_replica()
    wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == 1)
    return replica


def test_openmetrics_is_given_to_who_asks_for_it(leader: Replica) -> None:
    status, body = leader.get("/metrics", Accept="application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert status == 200
    assert body.endswith("# EOF\n")
    families = {family.name for family in parse_openmetrics(body)}
    assert {"agx_runs", "agx_run_duration_seconds", "agx_sidecar_leader"} <= families


def test_a_page_is_compressed_for_who_can_read_that(leader: Replica) -> None:
    connection = HTTPConnection("127.0.0.1", leader.port, timeout=10)
    connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
    response = connection.getresponse()
    body = response.read()
    assert response.headers["Content-Encoding"] == "gzip"
    assert b"agx_runs_total" in gzip.decompress(body)
    connection.request("HEAD", "/metrics")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


def test_health_readiness_and_nothing_else(leader: Replica) -> None:
    assert leader.get("/healthz") == (200, "ok\n")
    assert leader.get("/readyz") == (200, "ok\n")
    assert leader.get("/")[0] == 404
    connection = HTTPConnection("127.0.0.1", leader.port, timeout=10)
    connection.request("POST", "/metrics", body=b"x")
    assert connection.getresponse().status == 405
    connection.close()


def test_many_scrapers_at_once_all_get_a_page(leader: Replica) -> None:
    connections = [HTTPConnection("127.0.0.1", leader.port, timeout=30) for _ in range(30)]
    for connection in connections:
        connection.request("GET", "/metrics")
    assert {connection.getresponse().status for connection in connections} == {200}
    for connection in connections:
        connection.close()


def test_a_client_that_says_nothing_holds_nobody_up(leader: Replica) -> None:
    with socket.create_connection(("127.0.0.1", leader.port)) as silent:
        silent.sendall(b"GET /metrics HT")
        assert leader.scrape().total("agx_runs_total") == 1


def test_without_redis_it_is_healthy_not_ready_and_says_why(start_sidecar: StartReplica) -> None:
    with EmbeddedServer() as gone:
        url = gone.url
    replica = start_sidecar(url)
    wait_until_sync(lambda: "Redis can't be reached" in replica.log)
    assert replica.get("/healthz")[0] == 200
    status, reason = replica.get("/readyz")
    assert status == 503
    assert "Redis has not answered" in reason
    seen = replica.scrape()
    assert seen.get("agx_redis_up") == 0
    assert seen.get("agx_sidecar_leader") == 0
    assert replica.end() == 0
    assert "Traceback" not in replica.log


def test_a_restart_of_redis_is_one_line_down_and_one_line_up(start_sidecar: StartReplica) -> None:
    with EmbeddedServer() as server:
        with Redis.from_url(server.url) as client:
            Queue(client).add(started(), ended())
        replica = start_sidecar(server.url)
        wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == 1)
        server.kill()
        wait_until_sync(lambda: replica.scrape().get("agx_redis_up") == 0)
        server.start()  # nothing was kept
        wait_until_sync(lambda: "Redis answers again" in replica.log)
        with Redis.from_url(server.url) as client:
            Queue(client).add(ended(), ended("run-2"))
        wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == 2)
        assert replica.log.count("Redis can't be reached") == 1
        assert "Traceback" not in replica.log


def test_a_stuck_loop_is_unhealthy(leader: Replica) -> None:
    """A stopped process answers nothing at all, which a probe takes for unhealthy; after it, all is well again."""
    os.kill(leader.child.pid, signal.SIGSTOP)
    with socket.create_connection(("127.0.0.1", leader.port), timeout=0.5) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        with pytest.raises(TimeoutError):
            probe.recv(1)
    os.kill(leader.child.pid, signal.SIGCONT)
    wait_until_sync(lambda: leader.get("/healthz")[0] == 200)


def test_a_server_that_may_evict_is_said_loudly(start_sidecar: StartReplica) -> None:
    with EmbeddedServer(options=("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")) as server:
        replica = start_sidecar(server.url)
        wait_until_sync(lambda: "maxmemory-policy allkeys-lru" in replica.log)
        assert "ERROR" in replica.log


def test_logs_are_json_when_asked(queue: Queue, start_replica: StartReplica) -> None:
    replica = start_replica(AGX_LOG_FORMAT="json")
    wait_until_sync(lambda: "leading" in replica.log)
    lines = [json.loads(line) for line in replica.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)


def test_a_taken_port_ends_it_with_one_line(leader: Replica, redis_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agx_sidecar"],
        env={**os.environ, "AGX_REDIS_URL": redis_url, "AGX_HTTP_PORT": str(leader.port)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"agx-sidecar: can't listen on 127.0.0.1:{leader.port}")
    assert "AGX_HTTP_PORT" in done.stderr
    assert done.stderr.count("\n") == 1
