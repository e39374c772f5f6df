"""The probes of `agx worker`: /healthz (its event loop runs) and /readyz (it takes jobs)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import AgxError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from ..jobs.worker import Worker

logger = logging.getLogger("agx")


@asynccontextmanager
async def serve_health(worker: Worker, address: str) -> AsyncIterator[None]:
    """Serve the probes in the worker's own event loop, so that a blocked loop fails them.

    Raises:
        AgxError: uvicorn is missing, or the address can't be used.
    """
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise AgxError("--health needs uvicorn and starlette: pip install 'opale-agent-stream[worker]'")
    import uvicorn  # noqa: PLC0415 - it is an extra's

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the worker handles them

    listening = _listen(address)
    host, port, *_ = listening.getsockname()
    logger.info("agx: probes at http://%s:%d/readyz and /healthz", host, port)
    config = uvicorn.Config(
        _make_app(worker),
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]), name="agx-worker-health")
    try:
        yield
    finally:
        server.should_exit = True
        await serving
        listening.close()


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise AgxError(f"--health must be HOST:PORT, for example 0.0.0.0:8081, not {address!r}")
    host = host.strip("[]")
    try:
        return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise AgxError(f"--health can't listen on {address}: {error}") from None


def _make_app(worker: Worker) -> Starlette:
    from starlette.applications import Starlette  # noqa: PLC0415 - it is an extra's
    from starlette.responses import PlainTextResponse  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    async def show_health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def show_readiness(request: Request) -> Response:
        if worker.is_ready:
            return PlainTextResponse(f"ok, {worker.running} of {worker.at_once} runs\n")
        return PlainTextResponse("takes no jobs: it is stopping, or Redis does not answer\n", 503)

    return Starlette(routes=[Route("/healthz", show_health), Route("/readyz", show_readiness)])
