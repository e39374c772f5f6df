"""Simulates a twentieth of 10,000 users: the cores of each process, beside those that docs/capacity.md computes."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

import agx
from agx.embedded.server import EmbeddedServer
from agx.redis_session import RedisSessions
from agx.web import make_router

from .agents import configure_agx
from .machine import CLIENT_CORE, SERVER_CORE, cpu_seconds
from .report import Row
from .sidecar import SidecarUnderTest, sink
from .stats import Delays
from .workers import Line, Worker

_SCALE = 20
_USERS = 10_000 // _SCALE
_RUNS_PER_SECOND = 10_000 * 30 / 3_600 / _SCALE
_TOKENS, _RATE = 300, 15.0  # of an answer, which takes 20 s
_RAMP = 24.0  # seconds until as many runs end as begin
_WINDOW = 30.0  # seconds that are measured
_AT = re.compile(rb'"content(?:_delta)?": ?"([0-9;]+)"')

# Cores for 10,000 users, as docs/capacity.md has them.
_DOCUMENTED = {"service": 9.2, "Redis": 1.2, "sidecar": 0.3}


@dataclass(frozen=True, slots=True)
class _Simulated:
    cores: dict[str, float]  # at this scale
    delays: Delays  # from the model to the client
    runs: int
    failed: int


def measure_users() -> list[Row]:
    """Run the example of docs/capacity.md at a twentieth of its size; limit: FastAPI and pydantic-ai alone."""
    bare, found = _simulate("/bare"), _simulate("")
    tokens = _RUNS_PER_SECOND * _TOKENS
    limit_us, agx_us = (one.cores["service"] / tokens * 1e6 for one in (bare, found))
    rows = [
        Row(
            f"{_USERS} users, {_RUNS_PER_SECOND:.1f} runs begin a second: CPU of the service per token",
            "",
            f"{limit_us:.0f} us",
            f"{agx_us:.0f} us, {agx_us / limit_us:.2f} of the limit",
            "",
        )
    ]
    for part, cores in found.cores.items():
        documented = _DOCUMENTED[part] / _SCALE
        rows.append(
            Row(
                f"the same: cores of the {part}",
                f"{documented:.3f}, as documented",
                "",
                f"{cores:.3f}; {cores * _SCALE:.1f} for 10,000 users",
                "",
            )
        )
    rows.append(
        Row(
            "the same: model to client over HTTP, p50 / p99; runs that ended, failed",
            "",
            f"{bare.delays}; {bare.runs}, {bare.failed}",
            f"{found.delays}; {found.runs}, {found.failed}",
            "",
            found.failed == 0,
        )
    )
    return rows


def _simulate(prefix: str) -> _Simulated:
    with (
        EmbeddedServer() as redis,
        sink() as endpoint,
        Worker(CLIENT_CORE, serve, redis.url) as serving,
    ):
        port, pid = serving.receive()
        sidecar = SidecarUnderTest(redis.url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        pids = {"service": pid, "Redis": redis.pid, "sidecar": sidecar.child.pid}
        with Worker(SERVER_CORE, use, port, prefix) as using:
            using.receive()  # the ramp is over
            began, used = time.monotonic(), {name: cpu_seconds(pid) for name, pid in pids.items()}
            time.sleep(_WINDOW)
            elapsed = time.monotonic() - began
            cores = {name: (cpu_seconds(pid) - used[name]) / elapsed for name, pid in pids.items()}
            using.send("done")
            delays, runs, failed = using.receive()
        serving.send("done")
        serving.receive()
        sidecar.end()
    return _Simulated(cores, delays, runs, failed)


def make_user_agent() -> Agent[Any, str]:
    """Return an agent that calls a tool, and then answers at the pace of a model; each token has its time."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
        if len(messages[-1].parts) and messages[-1].parts[-1].part_kind == "user-prompt":
            yield {0: DeltaToolCall(name="look", json_args="{}", tool_call_id="call-1")}
            return
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(_TOKENS):
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += 1 / _RATE
            yield f"{time.monotonic_ns()};"

    agent: Agent[Any, str] = Agent(FunctionModel(stream_function=answer))

    @agent.tool_plain
    async def look() -> str:
        return "there"

    return agent


async def serve(line: Line, url: str) -> None:
    """Serve agx's router, and under `/bare` the same agent without agx."""
    configure_agx(url)
    app, agent = FastAPI(), make_user_agent()
    app.include_router(make_router(agent, authorize=lambda: (1, 1), sessions=RedisSessions()))

    @app.post("/bare/sessions/{session}/runs")
    async def bare(session: str, request: Request) -> StreamingResponse:
        prompt = (await request.json())["prompt"]

        async def frames() -> AsyncIterator[bytes]:
            async with agent.run_stream(prompt) as result:
                async for delta in result.stream_text(delta=True, debounce_by=None):
                    yield b"data: %b\n\n" % orjson.dumps({"content_delta": delta})

        return StreamingResponse(frames(), media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0), backlog=1_024) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        line.send((listening.getsockname()[1], os.getpid()))
        await line.receive()
        server.should_exit = True
        await serving
    await agx.aclose()


async def use(line: Line, port: int, prefix: str) -> tuple[Delays, int, int]:
    """Begin runs at an even pace and follow each one, until `line` receives a message; then wait for the last ones."""
    delays: list[int] = []
    failed = 0
    running: set[asyncio.Task[bool]] = set()
    done = asyncio.create_task(line.receive())
    ended = 0

    def on_end(task: asyncio.Task[bool]) -> None:
        nonlocal failed, ended
        running.discard(task)
        ended += 1
        failed += task.cancelled() or task.exception() is not None or not task.result()

    began = asyncio.get_running_loop().time()
    is_measured = False
    for n in itertools.count():
        now = asyncio.get_running_loop().time()
        if not is_measured and now - began >= _RAMP:
            is_measured = True
            line.send("ramp")
        if done.done():
            break
        task = asyncio.create_task(
            _run(port, f"{prefix}/sessions/user-{n}/runs", delays.append if is_measured else lambda delay: None)
        )
        running.add(task)
        task.add_done_callback(on_end)
        await asyncio.sleep(max(0.0, began + (n + 1) / _RUNS_PER_SECOND - asyncio.get_running_loop().time()))
    await asyncio.wait(set(running))
    return Delays.of(delays), ended, failed


async def _run(port: int, path: str, on_delay: Callable[[int], None]) -> bool:
    """Start a run and read its events to the end; return whether it was complete."""
    payload = orjson.dumps({"prompt": "Hello"})
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + payload)
    tokens, left = 0, b""
    while part := await reader.read(65_536):
        now = time.monotonic_ns()
        whole, _, left = (left + part).rpartition(b"\n\n")
        for found in _AT.findall(whole):
            for at in found.split(b";")[:-1]:
                tokens += 1
                on_delay(now - int(at))
    writer.close()
    return tokens == _TOKENS
