"""`make example`: a Valkey, a sidecar, two workers and the web process on this machine, until Ctrl-C."""

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from agx.demo.sidecar import SidecarProcess
from agx.server import EmbeddedServer

PORT = int(os.environ.get("PORT", "8000"))
URL = f"http://127.0.0.1:{PORT}"
WORKER = [str(Path(sys.executable).with_name("agx")), "worker", "shop.agents:worker"]
WEB = [sys.executable, "-m", "uvicorn", "shop.web:app", "--port", str(PORT), "--log-level", "warning"]

Process = subprocess.Popen[bytes]


def main() -> None:
    """Run everything; a worker that dies is replaced, as a supervisor such as Kubernetes does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="agx-shop-") as home, EmbeddedServer() as server:
        sidecar = SidecarProcess(server.url)
        environment = {
            **os.environ,
            "AGX_REDIS_URL": server.url,
            "SHOP_DATABASE": f"sqlite+aiosqlite:///{home}/shop.sqlite",
            "SHOP_SECRET": secrets.token_urlsafe(32),
            "PYDANTIC_AI_NO_BANNER": "1",
        }
        processes: list[Process] = []
        try:
            asyncio.run(sidecar.start(watched=True))
            web = start(WEB, environment, processes)
            wait_until_served(web)  # it has made the table
            workers = [start(WORKER, environment, processes) for _ in range(2)]
            print(f"\nthe shop   {URL}  (users ada, bob and eve; passwords lamp, desk and sofa)")
            print(f"console    {sidecar.console_url}\nmetrics    {sidecar.url}/metrics")
            print(f"Redis      {server.url}  (for agx ls, agx tail)")
            print(f"workers    processes {workers[0].pid} and {workers[1].pid}\nto end     Ctrl-C\n", flush=True)
            while web.poll() is None:
                time.sleep(0.2)
                for n, worker in enumerate(workers):
                    if worker.poll() is not None:
                        workers[n] = start(WORKER, environment, processes)
                        print(f"process {worker.pid} has ended: process {workers[n].pid} replaces it", flush=True)
            sys.exit(f"the web process has ended with {web.returncode}")
        except KeyboardInterrupt:
            print("\nstopping ...", flush=True)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
            sidecar.stop()


def stop(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def start(command: list[str], environment: dict[str, str], processes: list[Process]) -> Process:
    """Start a process that Ctrl-C in the terminal does not reach: `main()` sends it a SIGTERM."""
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, start_new_session=True)
    processes.append(process)
    return process


def wait_until_served(web: Process) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while web.poll() is None:
        try:
            opener.open(URL, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit(f"the web process did not start: is port {PORT} taken? PORT=8001 make example")


if __name__ == "__main__":
    main()
