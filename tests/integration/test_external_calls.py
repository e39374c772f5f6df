"""A call that is made elsewhere (CallDeferred): the page gives its result, once, also after it was loaded again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent, CallDeferred, DeferredToolRequests
from support.agents import ScopeDeps, call, scripted

from agx.sessions.redis_session import RedisSessions
from agx.web import make_vercel_ai_router

pytestmark = pytest.mark.usefixtures("configured")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    calls = [*call("measure", call_id="c1", index=0), *call("delete", call_id="c2", index=1)]
    agent: Agent[Any, str | DeferredToolRequests] = Agent(
        scripted(calls, ["It is warm"]), deps_type=ScopeDeps, output_type=[str, DeferredToolRequests]
    )

    @agent.tool_plain
    def measure() -> str:
        raise CallDeferred

    @agent.tool_plain(requires_approval=True)
    def delete() -> str:
        return "deleted"

    app = FastAPI()
    app.include_router(
        make_vercel_ai_router(agent, authorize=lambda: (1, 1), sessions=RedisSessions(ttl=60)), prefix="/chat"
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def send(client: httpx.AsyncClient, message: dict[str, Any]) -> httpx.Response:
    return await client.post("/chat", json={"id": "s", "trigger": "submit-message", "messages": [message]})


async def last_parts(client: httpx.AsyncClient) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the last message as a page has it that was loaded again, and its tool parts by call."""
    message = (await client.get("/chat/s")).json()["messages"][-1]
    return message, {part["toolCallId"]: part for part in message["parts"] if "toolCallId" in part}


async def test_a_result_is_given_once_and_an_approval_stays_an_approval(client: httpx.AsyncClient) -> None:
    asked = await send(client, {"id": "m1", "role": "user", "parts": [{"type": "text", "text": "How warm is it?"}]})
    assert asked.status_code == 200
    message, parts = await last_parts(client)
    assert {call_id: part["state"] for call_id, part in parts.items()} == {
        "c1": "input-available",
        "c2": "approval-requested",
    }

    parts["c2"] |= {"state": "output-available", "output": "made up"}
    parts["c1"] |= {"state": "output-available", "output": "21 degrees"}
    made_up = await send(client, message)
    assert (made_up.status_code, made_up.json()["code"]) == (409, "conversation_changed")

    del parts["c2"]["output"]
    parts["c2"] |= {"state": "approval-responded", "approval": {"id": "c2", "approved": True}}
    answered = await send(client, message)
    assert answered.status_code == 200
    assert "It is warm" in answered.text
    message, parts = await last_parts(client)
    assert {call_id: part["output"] for call_id, part in parts.items()} == {"c1": "21 degrees", "c2": "deleted"}

    again = await send(client, message)
    assert again.status_code == 409
