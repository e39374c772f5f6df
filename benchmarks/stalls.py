"""Clients that stop reading: their effect on other clients, and how long a shutdown waits for them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

import agx
from agx.embedded.server import EmbeddedServer
from agx.redis_session import RedisSessions
from agx.web import graceful_shutdown, make_router

from .agents import configure_agx
from .http import Client, Load, write_session
from .machine import CLIENT_CORE, SERVER_CORE
from .report import Row
from .stats import Delays
from .workers import Line, Worker

_STALLED, _GOOD = 50, 10
_LOAD = Load(1, _GOOD, 20.0, 6)
_PADDING = "x" * 100_000  # of each event: together more than the buffers of all kernels hold for a stalled client
_GRACE = 2.0  # seconds that `graceful_shutdown()` gives to runs


def measure_stalls() -> list[Row]:
    """Measure 10 good clients alone and beside 50 that stall, then a SIGTERM while these are connected."""
    with (
        EmbeddedServer() as redis,
        Worker(CLIENT_CORE, serve, redis.url) as serving,
        Worker(SERVER_CORE, follow, redis.url, serving.receive()) as clients,
    ):
        alone, beside = clients.receive()
        began = time.monotonic()
        os.kill(serving.pid, signal.SIGTERM)
        serving.join()
        ended = time.monotonic() - began
        clients.send("done")
        clients.receive()
    return [
        Row(
            f"{_GOOD} clients beside {_STALLED} that take nothing, p50 / p99; limit: alone",
            "their p99 alone",
            str(alone),
            str(beside),
            "",
            beside.p99 <= 1.5 * alone.p99,
        ),
        Row(
            f"SIGTERM with {_STALLED} such clients: seconds until the process has ended",
            f"{_GRACE + 5:.0f}",
            "",
            f"{ended:.1f}",
            "",
            ended <= _GRACE + 5,
        ),
    ]


async def serve(line: Line, url: str) -> None:
    """Serve agx's router until a SIGTERM."""
    configure_agx(url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with graceful_shutdown(_GRACE):
            yield

    app = FastAPI(lifespan=lifespan)
    app.include_router(make_router(Agent(TestModel()), authorize=lambda: (1, 1), sessions=RedisSessions()))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0), backlog=1_024) as listening:
        line.send(listening.getsockname()[1])
        await server.serve(sockets=[listening])


async def follow(line: Line, url: str, port: int) -> tuple[Delays, Delays]:
    """Return the delays of the good clients, alone and beside those that stall, which stay connected."""
    configure_agx(url)
    alone = await _round(port, "alone")
    await agx.start(1, 1, "beside")
    stalled = [await _stall(port, "beside") for _ in range(_STALLED)]
    beside = await _round(port, "beside")
    line.send((alone, beside))
    await line.receive()
    for connection in stalled:
        connection.close()
    await agx.aclose()
    return alone, beside


async def _round(port: int, session: str) -> Delays:
    if not await agx.is_live(1, 1, session):
        await agx.start(1, 1, session)
    clients = [Client(session) for _ in range(_GOOD)]
    await asyncio.gather(*(client.connect(port) for client in clients))
    await write_session(session, _LOAD, 0.0, padding=_PADDING)
    for client in clients:
        await client.ended
    return Delays.of([delay for client in clients for delay in client.delays])


async def _stall(port: int, session: str) -> socket.socket:
    """Return the connection of a client that has asked for a session's events, and takes none."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    await loop.sock_sendall(connection, f"GET /sessions/{session}/events HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    return connection
