"""docs/how-to/steer.md: its function, and the same over HTTP and in the chat protocols."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import Gate, prompts, scripted
from support.docs import every_block

import agx
from agx.redis_session import RedisSessions
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router


async def test_every_block(configured: Redis) -> None:
    page: dict[str, Any] = {}
    with every_block("docs/how-to/steer.md") as blocks:
        exec(blocks.take("python"), page)
    gate = Gate()
    with page["agent"].override(model=scripted(["Hello", gate], ["Bonjour"], ["Ciao"])):
        first = asyncio.create_task(page["say"]("chat-1", "Hi", "m1"))
        await gate.reached.wait()
        await page["say"]("chat-1", "In French", "m2")
        await page["say"]("chat-1", "In French", "m2")
        gate.open.set()
        await first
        await page["say"]("chat-1", "In Italian", "m3")
    session = agx.RedisSession("acme", "ada", "chat-1")
    await session.load()
    assert prompts(session.msgs) == ["Hi", "In French", "In Italian"]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def client(configured: Redis, gate: Gate) -> Any:
    """A client of all three routers, in this loop; the agent waits at the gate in its first answer."""
    agent = Agent(scripted(["Hello", gate], ["Bonjour"]), name="a")
    app, given = FastAPI(), {"authorize": lambda: ("acme", "ada"), "sessions": RedisSessions()}
    app.include_router(make_router(agent, **given), prefix="/api")  # type: ignore[arg-type]
    app.include_router(make_vercel_ai_router(agent, **given), prefix="/chat")  # type: ignore[arg-type]
    app.include_router(make_ag_ui_router(agent, **given), prefix="/ag-ui")  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_over_http(client: httpx.AsyncClient, gate: Gate) -> None:
    text = {"text": "In French", "key": "k"}
    for path in ("/api/sessions/s/steer", "/chat/s/steer", "/ag-ui/s/steer"):
        refused = await client.post(path, json=text)
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    await client.post("/api/sessions/s/runs", json={"prompt": "Hi"})
    await gate.reached.wait()
    for body in ({}, {"text": ""}, {"text": "é" * 32_768}, {"text": "a", "key": "a:b"}):
        assert (await client.post("/api/sessions/s/steer", json=body)).status_code == 422, body
    assert (await client.post("/chat/s/steer", content=b'{"text": "\\ud800"}')).status_code == 422
    for path in ("/api/sessions/s/steer", "/chat/s/steer", "/ag-ui/s/steer"):
        accepted = await client.post(path, json=text)
        assert (accepted.status_code, accepted.json()) == (202, {"steered": True})
    for n in range(49):
        await agx.steer("acme", "ada", "s", f"{n}")
    assert (await client.post("/chat/s/steer", json={"text": "more"})).status_code == 429
    second_tab = asyncio.create_task(client.get("/chat/s/stream"))
    gate.open.set()
    chunks = (await second_tab).text
    assert '"data-enqueued-messages"' in chunks
    assert chunks.index("Hello") < chunks.index("In French") < chunks.index("Bonjour")
    joined = await client.post(
        "/ag-ui/connect", json={"threadId": "s", "runId": "r", "messages": [], "protocolVersion": "1.0"}
    )
    assert "In French" in joined.text
