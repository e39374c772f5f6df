"""Events over HTTP: what a delivery to a browser costs, beside ready bytes (the floor) and an XREAD per client."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis

import agx
from agx.embedded.server import EmbeddedServer
from agx.redis_session import RedisSessions
from agx.web import make_router

from .agents import configure_agx
from .machine import CLIENT_CORE, SERVER_CORE, resident_bytes
from .report import Row
from .stats import Delays
from .workers import Line, Worker

CONTESTANTS = ("floor", "agx", "xread")
_ROUNDS = 3
_TOGETHER = 50  # clients that connect at once
_AT = re.compile(rb'"at": ?(\d+)')
_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]

App = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Load:
    """How many sessions and clients, at how many events a second and session, for how long."""

    sessions: int
    clients: int
    rate: float
    seconds: float

    @property
    def events(self) -> int:
        """Events of one session."""
        return int(self.rate * self.seconds)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What serving a load took."""

    complete: int  # clients that received every event
    delays: Delays  # from the writer to the client
    cpu_us: float  # of the serving process, microseconds per delivery
    client_bytes: float  # resident memory of the serving process per client


def measure_http() -> list[Row]:
    """Measure event streams of many clients, as a browser's EventSource opens them."""
    rows: list[Row] = []
    for what, load, goal_us in (
        ("1,000 clients on one session, 10 events/s", Load(1, 1_000, 10.0, 6), 30),
        ("100 sessions with a client each, 30 events/s", Load(100, 100, 30.0, 6), 90),
        ("1,000 sessions with a client each, 1 event/s", Load(1_000, 1_000, 1.0, 6), 170),
    ):
        found = {name: [_measure(name, load) for _ in range(_ROUNDS)] for name in CONTESTANTS}
        best = {name: min(rounds, key=lambda one: one.cpu_us) for name, rounds in found.items()}
        rows.append(
            Row(
                f"{what}: CPU of the web process per delivery, p50 / p99",
                f"{goal_us} us",
                _show(best["floor"], load),
                _show(best["agx"], load),
                _show(best["xread"], load),
                best["agx"].cpu_us <= goal_us,
            )
        )
        if load.sessions == 1:
            kib = {name: one.client_bytes / 1024 for name, one in best.items()}
            rows.append(
                Row(
                    "memory of the web process per client",
                    "22 KiB",
                    f"{kib['floor']:.0f} KiB",
                    f"{kib['agx']:.0f} KiB",
                    f"{kib['xread']:.0f} KiB",
                    kib["agx"] <= 22,
                )
            )
    return rows


def _show(found: Delivered, load: Load) -> str:
    complete = "" if found.complete == load.clients else f", {found.complete:,} of {load.clients:,} complete"
    return f"{found.cpu_us:.0f} us, {found.delays}{complete}"


def _measure(name: str, load: Load) -> Delivered:
    with (
        EmbeddedServer(options=("--maxclients", "20000")) as redis,
        Worker(CLIENT_CORE, serve, redis.url, name, load) as server,
        Worker(SERVER_CORE, follow_all, redis.url, name, load, server.receive()) as clients,
    ):
        clients.receive()  # all are connected
        server.send("go")
        client_bytes = server.receive()
        clients.send("go")
        complete, delays = clients.receive()
        server.send("done")
        cpu_seconds = server.receive()
    return Delivered(complete, delays, cpu_seconds * 1e6 / delays.count, client_bytes)


# --- the serving process


async def serve(line: Line, url: str, name: str, load: Load) -> float:
    """Serve event streams at `/sessions/{session}/events`; return the CPU seconds that the load took."""
    configure_agx(url)
    floor = _Floor(load)
    async with Redis.from_url(url, max_connections=100_000) as redis:
        app: App = {"floor": floor, "agx": _make_agx_app(), "xread": _make_xread_app(redis)}[name]
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, backlog=4_096)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0), backlog=4_096) as listening:
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            gc.collect()
            before = resident_bytes()
            line.send(listening.getsockname()[1])
            await line.receive()
            gc.collect()
            line.send((resident_bytes() - before) / load.clients)
            cpu = time.process_time()
            if name == "floor":
                await floor.send_all()
            await line.receive()
            cpu = time.process_time() - cpu
            server.should_exit = True
            await serving
    await agx.aclose()
    return cpu


class _Floor:
    """One loop that sends ready bytes to its clients; it reads no Redis."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._clients: dict[str, list[Any]] = {}
        self._ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b": begin\n\n", "more_body": True})
        self._clients.setdefault(scope["path"], []).append(send)
        await self._ended.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_all(self) -> None:
        """Send every session's events to its clients, evenly over time."""
        load = self._load
        groups = list(self._clients.values())

        async def send_session(clients: list[Any], phase: float) -> None:
            async for _ in _ticks(load, phase):
                body = b'id: 1-0\ndata: {"body": {"at": %d}}\n\n' % time.monotonic_ns()
                message = {"type": "http.response.body", "body": body, "more_body": True}
                for send in clients:
                    await send(message)

        await asyncio.gather(*(send_session(clients, n / len(groups)) for n, clients in enumerate(groups)))
        self._ended.set()


def _make_agx_app() -> FastAPI:
    app = FastAPI()
    agent = Agent(TestModel())
    app.include_router(make_router(agent, authorize=lambda: (1, 1), sessions=RedisSessions()))
    return app


def _make_xread_app(redis: Redis) -> FastAPI:
    """Return what a service writes by hand: a reader of its own for each client."""
    app = FastAPI()

    async def frames(session: str) -> AsyncGenerator[str, None]:
        cursor = "0"
        while True:
            for _, entries in await redis.xread({f"agx:1:1:{session}": cursor}, block=3_000) or ():
                for entry_id, fields in entries:
                    cursor = entry_id.decode()
                    kind = fields[b"type"].decode()
                    event = {"id": cursor, "type": kind, "body": orjson.Fragment(fields[b"body"])}
                    yield f"id: {cursor}\ndata: {orjson.dumps(event).decode()}\n\n"
                    if kind == "end":
                        return

    @app.get("/sessions/{session}/events")
    async def follow(session: str) -> StreamingResponse:
        return StreamingResponse(frames(session), media_type="text/event-stream")

    return app


# --- the process of the clients, which also writes the events


async def follow_all(line: Line, url: str, name: str, load: Load, port: int) -> tuple[int, Delays]:
    """Follow every session with its clients, have the events written, return who received all, and how late."""
    configure_agx(url)
    names = [f"s{number}" for number in range(load.sessions)]
    await asyncio.gather(*(agx.start(1, 1, session) for session in names))
    clients = [Client(names[number % load.sessions]) for number in range(load.clients)]
    for first in range(0, len(clients), _TOGETHER):
        await asyncio.gather(*(client.connect(port) for client in clients[first : first + _TOGETHER]))
    line.send("connected")
    await line.receive()
    if name != "floor":
        await asyncio.gather(*(write_session(session, load, n / load.sessions) for n, session in enumerate(names)))
    async with asyncio.timeout(load.seconds + 30):
        for client in clients:
            await client.ended
    await agx.aclose()
    delays = Delays.of([delay for client in clients for delay in client.delays])
    return sum(len(client.delays) == load.events for client in clients), delays


class Client(asyncio.Protocol):
    """A browser that follows a session, reduced to its socket."""

    def __init__(self, session: str) -> None:
        loop = asyncio.get_running_loop()
        self.delays: list[int] = []  # of events, in nanoseconds
        self.ended: asyncio.Future[None] = loop.create_future()
        self._joined: asyncio.Future[None] = loop.create_future()
        self._request = f"GET /sessions/{session}/events HTTP/1.1\r\nHost: bench\r\n\r\n".encode()

    async def connect(self, port: int) -> None:
        """Open the stream, up to its first event."""
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)
        transport.write(self._request)
        await self._joined

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.delays += [now - int(at) for at in _AT.findall(data)]
        if not self._joined.done() and b"begin" in data:
            self._joined.set_result(None)
        if data.endswith(b"0\r\n\r\n") and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def write_session(session: str, load: Load, phase: float, *, padding: str = "") -> None:
    """Write a session's events, evenly over time, and end it."""
    async for _ in _ticks(load, phase):
        body = {"at": time.monotonic_ns(), "padding": padding}
        await agx.add(1, 1, session, type="info", origin="benchmark", body=body)
    await agx.stop(1, 1, session)


async def _ticks(load: Load, phase: float) -> AsyncGenerator[None, None]:
    loop = asyncio.get_running_loop()
    due = loop.time() + phase / load.rate
    for _ in range(load.events):
        await asyncio.sleep(max(0.0, due - loop.time()))
        due += 1 / load.rate
        yield
