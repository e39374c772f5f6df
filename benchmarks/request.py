"""What a request costs: the first token of a POST, short runs, and a chat route beside upstream's own adapter."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from pydantic_ai.ui.vercel_ai import VercelAIAdapter

import agx
from agx.embedded.server import EmbeddedServer
from agx.redis_session import RedisSessions
from agx.web import make_router, make_vercel_ai_router

from . import workers
from .agents import Drive, configure_agx, drive_agx, drive_bare, make_agent, new_session
from .machine import CLIENT_CORE, SERVER_CORE, cpu_seconds
from .report import Row
from .workers import Line, Worker

_ROUNDS = 5
_SHORT_RUNS = 40  # a round
_POSTS = 40
_CHATS = 20  # at once
_DELTAS = 60  # of a chat's answer
_RATE = 30.0  # deltas a second of a paced answer
_CHAT_ROUNDS = 3


def measure_request() -> list[Row]:
    """Measure what is spent around the deltas of a request."""
    with EmbeddedServer() as server:
        short: dict[int, float] = workers.measure(CLIENT_CORE, run_short, server.url)
    with (
        EmbeddedServer() as server,
        Worker(CLIENT_CORE, serve, server.url) as serving,
        Worker(SERVER_CORE, ask, *serving.receive()) as asking,
    ):
        (bare_ms, agx_ms), chats = asking.receive()
        serving.send("done")
        serving.receive()
    rows = [
        Row(
            f"short runs, 2 model requests and a tool, {at_once} at once: CPU over the bare loop",
            "1.3",
            "1.00",
            f"{ratio:.2f}",
            "",
            ratio <= 1.3,
        )
        for at_once, ratio in short.items()
    ]
    rows.append(
        Row(
            "POST to the first byte of the answer, one at a time, median",
            "limit + 4 ms",
            f"{bare_ms:.1f} ms",
            f"{agx_ms:.1f} ms",
            "",
            agx_ms <= bare_ms + 4,
        )
    )
    for what, ratio in chats.items():
        rows.append(
            Row(
                f"chat route, {what}: CPU of the web process per answer, over upstream's adapter",
                "1.0",
                "1.00",
                f"{ratio:.2f}",
                "",
                ratio <= 1.0,
            )
        )
    return rows


# --- short runs


def make_short_agent() -> Agent[Any, str]:
    """Return an agent that calls a tool, and then answers in three words."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
        if len(messages) == 1:
            yield {0: DeltaToolCall(name="look", json_args="{}", tool_call_id="call-1")}
        else:
            for word in ("a ", "short ", "answer"):
                yield word

    agent: Agent[Any, str] = Agent(FunctionModel(stream_function=answer))

    @agent.tool_plain
    async def look() -> str:
        return "there"

    return agent


async def run_short(line: Line, url: str) -> dict[int, float]:
    """Return the CPU of short runs over that of the bare loop, by how many are live at once."""
    configure_agx(url)
    agent = make_short_agent()
    ratios = {}
    for at_once in (1, 20):
        for drive in (drive_bare, drive_agx):
            await _cpu_of(drive, agent, at_once)
        rounds = [
            (await _cpu_of(drive_bare, agent, at_once), await _cpu_of(drive_agx, agent, at_once))
            for _ in range(_ROUNDS)
        ]
        ratios[at_once] = statistics.median(ours / bare for bare, ours in rounds)
    await agx.aclose()
    return ratios


async def _cpu_of(drive: Drive, agent: Agent[Any, str], at_once: int) -> float:
    left = iter(range(_SHORT_RUNS))

    async def run_some() -> None:
        for _ in left:
            await drive(agent, new_session("short"))

    gc.collect()
    began = time.process_time()
    await asyncio.gather(*(run_some() for _ in range(at_once)))
    return time.process_time() - began


# --- the serving process


async def serve(line: Line, url: str) -> None:
    """Serve every contestant: `/bare`, agx's router, and for each pace a chat of upstream's and one of ours."""
    configure_agx(url)
    app = FastAPI()
    answering = make_agent(_DELTAS)

    @app.post("/bare")
    async def bare(request: Request) -> StreamingResponse:
        prompt = (await request.json())["prompt"]

        async def text() -> AsyncIterator[str]:
            async with answering.run_stream(prompt) as result:
                async for delta in result.stream_text(delta=True, debounce_by=None):
                    yield f"data: {json.dumps(delta)}\n\n"

        return StreamingResponse(text(), media_type="text/event-stream")

    who, sessions = (lambda: (1, 1)), RedisSessions()
    app.include_router(make_router(answering, authorize=who, sessions=sessions))
    for pace, agent in (("unpaced", answering), ("paced", make_agent(_DELTAS, rate=_RATE))):
        app.include_router(make_vercel_ai_router(agent, authorize=who, sessions=sessions), prefix=f"/agx-{pace}")
        app.add_api_route(f"/upstream-{pace}", _make_upstream(agent), methods=["POST"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0), backlog=1_024) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        line.send((listening.getsockname()[1], os.getpid()))
        await line.receive()
        server.should_exit = True
        await serving
    await agx.aclose()


def _make_upstream(agent: Agent[Any, str]) -> Callable[[Request], Awaitable[Response]]:
    async def chat(request: Request) -> Response:
        return await VercelAIAdapter.dispatch_request(request, agent=agent)

    return chat


# --- the asking process


async def ask(line: Line, port: int, pid: int) -> tuple[tuple[float, float], dict[str, float]]:
    """Return the medians of the first byte, bare and agx, in ms, and the CPU of a chat over upstream's by pace."""
    names = itertools.count()
    question = {"prompt": "Hello"}

    async def first_byte(path: str) -> float:
        began = time.perf_counter()
        await _post(port, path, question, until=b"token")
        return (time.perf_counter() - began) * 1e3

    delays: dict[str, list[float]] = {"bare": [], "agx": []}
    for _ in range(_POSTS):
        delays["bare"].append(await first_byte("/bare"))
        delays["agx"].append(await first_byte(f"/sessions/first-{next(names)}/runs"))

    async def cpu_of(path: str) -> float:
        began = cpu_seconds(pid)
        await asyncio.gather(*(_post(port, path, _chat(f"chat-{next(names)}")) for _ in range(_CHATS)))
        return cpu_seconds(pid) - began

    chats = {}
    for pace in ("unpaced", "paced"):
        rounds = [(await cpu_of(f"/upstream-{pace}"), await cpu_of(f"/agx-{pace}")) for _ in range(_CHAT_ROUNDS + 1)]
        chats[pace] = statistics.median(ours / upstream for upstream, ours in rounds[1:])
    return (statistics.median(delays["bare"]), statistics.median(delays["agx"])), chats


def _chat(session: str) -> dict[str, Any]:
    message = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "Hello"}]}
    return {"id": session, "trigger": "submit-message", "messages": [message]}


async def _post(port: int, path: str, body: dict[str, Any], *, until: bytes = b"\r\n0\r\n\r\n") -> None:
    """Send a request on a connection of its own, and read the answer up to a text."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + payload)
    found = b""
    async with asyncio.timeout(60):
        while until not in found:
            part = await reader.read(65_536)
            assert part, f"{path} ended: {found[-300:]!r}"
            assert found or b" 200 " in part, part[:300]
            found += part
    writer.close()
