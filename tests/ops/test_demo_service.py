"""The service of compose.yaml: it shows up in Prometheus, and it goes on while no sidecar runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from ops.boards import ROOT
from support.replica import Replica
from support.waiting import wait_until_sync

from agx.embedded.child import Child
from agx.embedded.server import EmbeddedServer
from dashboards.preview.stack import Stack

SERVICE = ROOT / "deploy" / "demo_service.py"
# Runs that complete and runs that are lost, in turn, and an hour that lasts a few seconds: the service gives up a lost
# run when it has received nothing for _PATIENCE.
HURRIED = f"""
import asyncio, importlib.util
from agx.demo import traffic
spec = importlib.util.spec_from_file_location("demo_service", {str(SERVICE)!r})
service = importlib.util.module_from_spec(spec)
spec.loader.exec_module(service)
traffic._PATIENCE = 2
service.MIX = [service.LOST, service.COMPLETED]
asyncio.run(service.main())
"""


def _start(tmp_path: Path, redis_url: str, *command: str) -> tuple[Child, Path]:
    log = tmp_path / "service.log"
    environment = os.environ | {"AGX_REDIS_URL": redis_url}
    return Child([sys.executable, *command], log=log, home=tmp_path, environment=environment), log


@pytest.mark.prometheus
def test_the_demo_service_shows_up_in_prometheus(stack: Stack, tmp_path: Path) -> None:
    service, log = _start(tmp_path, stack.redis_url, str(SERVICE))
    shown = 'agx_runs_total{outcome="completed", agent=~"travel|analyst"} > 0'
    try:
        wait_until_sync(lambda: service.ended or stack.query(shown), timeout=60, what=shown)
    finally:
        code = service.end()
    assert code == 0, log.read_text()


def test_the_demo_service_goes_on_while_both_sidecars_are_down(tmp_path: Path) -> None:
    with EmbeddedServer() as server:
        sidecars = [Replica(tmp_path / name, server.url) for name in ("first", "second")]
        service, log = _start(tmp_path, server.url, "-c", HURRIED)

        def wait_for(line: str) -> None:
            """Wait until the service has printed the line once more."""
            before = log.read_text().count(line)

            def seen() -> bool:
                assert not service.ended, log.read_text()
                return log.read_text().count(line) > before

            wait_until_sync(seen, timeout=60, what=f"{line!r} in the log")

        try:
            wait_for(" completed after")
            for sidecar in sidecars:
                sidecar.end(signal.SIGKILL)
            wait_for("nobody ended it")
            wait_for(" completed after")
        finally:
            code = service.end()
            for sidecar in sidecars:
                sidecar.end(signal.SIGKILL)
        assert code == 0, log.read_text()
