"""The demo's sidecar: the real one, as a process of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from ..embedded.child import Child, draw_ports
from ..errors import AgxError

_DEFAULT_PORTS = (9464, 9465)  # /metrics, where people's Prometheus looks for it already, and the console
_READY_TIMEOUT = 30.0  # seconds
_TAKEN = "Address already in use"


class SidecarProcess:
    """A running `python -m agx_sidecar` on a Redis URL; `url` is its address. Ends with `stop()`."""

    def __init__(self, redis_url: str) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="agx-demo-"))
        self._redis_url = redis_url
        self._child: Child | None = None
        self._port = self._console_port = 0
        self._token = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def console_url(self) -> str:
        """The console's address; behind the # is the token, which its page takes and no request repeats."""
        return f"http://127.0.0.1:{self._console_port}/#token={self._token}"

    async def start(self, *, watched: bool) -> None:
        """Start it and wait until it is ready; with a console and on the usual ports, if free, where it is `watched`.

        Raises AgxError with its log if it ends or isn't ready in time.
        """
        for ports in [_DEFAULT_PORTS] * watched + list(zip(draw_ports(10), draw_ports(10), strict=True)):
            self._port, self._console_port = ports
            environment = {
                **os.environ,
                "AGX_REDIS_URL": self._redis_url,
                "AGX_HTTP_HOST": "127.0.0.1",
                "AGX_HTTP_PORT": str(self._port),
                "AGX_CONSOLE": "full" if watched else "off",
                "AGX_CONSOLE_PORT": str(self._console_port),
                "AGX_CONSOLE_TOKEN": self._token,
                "AGX_CONSOLE_CONTENT": "1",
            }
            command = [sys.executable, "-m", "agx_sidecar"]
            self._child = Child(command, log=self._log, home=self._home, environment=environment)
            if await self._is_ready(self._child):
                return
            if _TAKEN not in self._log.read_text(errors="replace"):
                break
        raise AgxError(f"the sidecar did not start; its log ends:\n{self._log.read_text(errors='replace')[-2_000:]}")

    async def metrics(self) -> str:
        """Return its /metrics; raises AgxError if it doesn't answer."""
        status, body = await asyncio.to_thread(self._get, "/metrics")
        if status != 200:
            raise AgxError(f"the sidecar's /metrics answered {status}: {body[:500]}")
        return body

    def stop(self) -> None:
        """End it, and wait until it has drained."""
        if self._child is not None:
            self._child.end()
            self._child = None
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._home / "sidecar.log"

    async def _is_ready(self, child: Child) -> bool:
        deadline = time.monotonic() + _READY_TIMEOUT
        while time.monotonic() < deadline:
            if child.ended:  # before the question, since a stranger may answer on this port
                return False
            status, _ = await asyncio.to_thread(self._get, "/readyz")
            if status == 200:
                return not child.ended
            await asyncio.sleep(0.05)
        return False

    def _get(self, path: str) -> tuple[int, str]:
        # No urlopen: it would ask a proxy from the environment for our own machine.
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}"
        finally:
            connection.close()
