"""A call that is made elsewhere (CallDeferred): the page gives its result, once, also after it was loaded again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic_ai import Agent, CallDeferred, DeferredToolRequests
from support.agents import ScopeDeps, call, scripted

import agx
from agx.sessions.redis_session import RedisSessions
from agx.web import make_ag_ui_router, make_vercel_ai_router

pytestmark = pytest.mark.usefixtures("configured")


@pytest.fixture
def agent() -> Agent[Any, str | DeferredToolRequests]:
    calls = [*call("measure", call_id="c1", index=0), *call("delete", call_id="c2", index=1)]
    agent: Agent[Any, str | DeferredToolRequests] = Agent(
        scripted(calls, ["It is warm"]), deps_type=agx.Deps, output_type=[str, DeferredToolRequests]
    )

    @agent.tool_plain
    def measure() -> str:
        raise CallDeferred

    @agent.tool_plain(requires_approval=True)
    def delete() -> str:
        return "deleted"

    return agent


@pytest.fixture
async def client(agent: Agent[Any, Any]) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    store = RedisSessions(ttl=60)
    app.include_router(make_vercel_ai_router(agent, authorize=lambda: (1, 1), sessions=store), prefix="/chat")
    app.include_router(make_ag_ui_router(agent, authorize=lambda: (1, 1), sessions=store), prefix="/ag-ui")
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


async def test_a_run_that_no_router_started_marks_its_calls(client: httpx.AsyncClient, agent: Agent[Any, Any]) -> None:
    session = RedisSessions(ttl=60).open(1, 1, "s")
    await agx.run(session, agent, "How warm is it?", ScopeDeps())
    _, parts = await last_parts(client)
    assert parts["c1"]["state"] == "input-available"
    assert parts["c2"]["state"] == "approval-requested"


# --- AG-UI ---


async def run_ag_ui(client: httpx.AsyncClient, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
    request = {"threadId": "s", "runId": "r", "protocolVersion": "1.0", "messages": messages, **more}
    return await client.post("/ag-ui", json=request)


async def join_ag_ui(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    joined = await client.post("/ag-ui/connect", json={"threadId": "s", "runId": "r"})
    return [json.loads(line.removeprefix("data: ")) for line in joined.text.splitlines() if line.startswith("data: ")]


QUESTION = {"id": "m1", "role": "user", "content": "How warm is it?"}
APPROVED = [{"interruptId": "int-c2", "status": "resolved", "payload": {"approved": True}}]


def result_of(call_id: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"id": f"result-{call_id}", "role": "tool", "toolCallId": call_id, "content": content, **more}


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (result_of("c1", "21 degrees"), "21 degrees"),
        (result_of("c1", [{"type": "text", "text": "21 degrees"}]), "21 degrees"),
        (result_of("c1", "", error="no sensor"), "no sensor"),
    ],
    ids=["text", "parts", "error"],
)
async def test_a_front_end_over_ag_ui_gives_a_result_once(
    client: httpx.AsyncClient, result: dict[str, Any], expected: str
) -> None:
    assert (await run_ag_ui(client, [QUESTION])).status_code == 200
    (snapshot,) = [event for event in await join_ag_ui(client) if event["type"] == "MESSAGES_SNAPSHOT"]
    shown = snapshot["messages"]

    for refused in (
        await run_ag_ui(client, [*shown, result]),  # without the decision
        await run_ag_ui(client, shown, resume=APPROVED),  # without the result
        await run_ag_ui(client, [*shown, result_of("c3", "made up")], resume=APPROVED),
        await run_ag_ui(client, [*shown, result_of("c2", "made up"), result]),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "conversation_changed")

    answered = await run_ag_ui(client, [*shown, result], resume=APPROVED)
    assert "It is warm" in answered.text
    shown = next(event for event in await join_ag_ui(client) if event["type"] == "MESSAGES_SNAPSHOT")["messages"]
    results = {message["toolCallId"]: message["content"] for message in shown if message["role"] == "tool"}
    assert results == {"c1": expected, "c2": "deleted"}
    assert (await run_ag_ui(client, [*shown, result], resume=APPROVED)).status_code == 409


async def test_a_run_over_ag_ui_names_the_calls_that_wait(client: httpx.AsyncClient) -> None:
    asked = await run_ag_ui(client, [QUESTION])
    finished = json.loads(asked.text.strip().splitlines()[-1].removeprefix("data: "))
    assert [one["id"] for one in finished["outcome"]["interrupts"]] == ["int-c2"]
    assert "TOOL_CALL_RESULT" not in asked.text


@pytest.mark.parametrize(
    ("given", "status", "why"),
    [
        ({"tools": [{"description": "no name"}]}, 422, "tools.0.name"),
        ({"tools": [{"name": "not a name!"}]}, 422, "tools.0.name"),
        ({"tools": [{"name": "x", "parameters": "text"}]}, 422, "tools.0.parameters"),
        ({"state": {"color": []}}, 400, "The tools or the state can't be read: color"),
        ({"tools": [{"name": "delete"}]}, 400, "the agent has a tool of its own that is named 'delete'"),
        ({"state": "text", "tools": []}, 200, ""),
    ],
)
async def test_tools_and_a_state_that_are_none_are_refused(
    agent: Agent[Any, Any], given: dict[str, Any], status: int, why: str
) -> None:
    app = FastAPI()
    router = make_ag_ui_router(
        agent, authorize=lambda: (1, 1), sessions=RedisSessions(ttl=60), make_deps=lambda *ids: DoorDeps()
    )
    app.include_router(router, prefix="/ag-ui")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await run_ag_ui(client, [QUESTION], **given)
        assert (answer.status_code, why in answer.text) == (status, True)


class Door(BaseModel):
    color: str = "white"


@dataclass
class DoorDeps(ScopeDeps):
    state: Door = field(default_factory=Door)
