"""`python -m benchmarks.outage [SCALE]`: an hour of deploy/demo_service.py without a sidecar, SCALE (10) times as fast.

Prints the service's memory and what Redis holds twelve times, then starts a sidecar and compares its counters with what
the service itself has printed. Exit code 1: the service ended, facts were lost, or the counters differ.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from agx.embedded.child import Child, draw_ports
from agx.embedded.server import EmbeddedServer

SERVICE = Path(__file__).parents[1] / "deploy" / "demo_service.py"
PARTITIONS = 8
LOOKS = 12
_WARM = 20.0  # seconds before the outage
_CATCH_UP = 120.0  # seconds
_FASTER = """
import asyncio, importlib.util
spec = importlib.util.spec_from_file_location("demo_service", {service!r})
service = importlib.util.module_from_spec(spec)
spec.loader.exec_module(service)
service.PAUSE = tuple(seconds / {scale} for seconds in service.PAUSE)
asyncio.run(service.main())
"""


def main(scale: float) -> int:
    """Return the exit code."""
    home = Path(tempfile.mkdtemp(prefix="agx-outage-"))
    log = home / "service.log"
    with EmbeddedServer() as server, Redis.from_url(server.url) as redis:
        environment = os.environ | {"AGX_REDIS_URL": server.url, "AGX_HTTP_PORT": str(draw_ports(1)[0])}
        metrics = f"http://127.0.0.1:{environment['AGX_HTTP_PORT']}/metrics"
        sidecar = _start_sidecar(home, environment)
        code = _FASTER.format(service=str(SERVICE), scale=scale)
        service = Child([sys.executable, "-c", code], log=log, home=home, environment=environment)
        time.sleep(_WARM)
        sidecar.end(signal.SIGKILL)
        for look in range(LOOKS + 1):
            print(f"{look * 60 / LOOKS:.0f} min: {_describe(redis, service.pid)}", flush=True)
            if look < LOOKS:
                time.sleep(3_600 / scale / LOOKS)
        survived = not service.ended
        service.end()
        sidecar = _start_sidecar(home, environment)
        own = Counter(re.findall(r" (completed|cancelled|failed) after ", log.read_text()))
        counted, trimmed = _wait_for(metrics, own)
        sidecar.end()
    print(f"the service: {dict(own)}; the sidecar: {dict(counted)}; facts trimmed unread: {trimmed:.0f}")
    return 0 if survived and not trimmed and all(counted[outcome] == n for outcome, n in own.items()) else 1


def _start_sidecar(home: Path, environment: dict[str, str]) -> Child:
    command = [sys.executable, "-m", "agx_sidecar"]
    return Child(command, log=home / "sidecar.log", home=home / "none", environment=environment)


def _describe(redis: Redis, pid: int) -> str:
    resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    facts = [redis.xlen(f"agx::queue:{n}") for n in range(PARTITIONS)]
    memory = int(redis.info("memory")["used_memory"])
    service = int(resident[1]) // 1024 if resident else 0
    return f"service {service} MiB, Redis {memory >> 20} MiB, facts by partition {facts}"


def _wait_for(metrics: str, own: Counter[str]) -> tuple[Counter[str], float]:
    """Return the runs by outcome, and the trimmed facts, as soon as there are as many runs as the service had."""
    deadline = time.monotonic() + _CATCH_UP
    while True:
        time.sleep(1)
        try:
            families = list(text_string_to_metric_families(httpx.get(metrics).text))
        except httpx.TransportError:
            families = []
        samples = [sample for family in families for sample in family.samples]
        counted: Counter[str] = Counter()
        for sample in samples:
            if sample.name == "agx_runs_total":
                counted[sample.labels["outcome"]] += round(sample.value)
        trimmed = sum(sample.value for sample in samples if sample.name == "agx_queue_trimmed_total")
        if all(counted[outcome] >= n for outcome, n in own.items()) or time.monotonic() > deadline:
            return counted, trimmed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
