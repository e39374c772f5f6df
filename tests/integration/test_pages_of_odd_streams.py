"""The routers' pages of a conversation with odd values, and of a stream that others wrote to: exact, never a 500."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import call, scripted

from agx.sessions.redis_session import RedisSessions
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router

BIG = 123456789012345678901234567890
QUESTION = {"id": "s", "messages": [{"id": "m", "role": "user", "parts": [{"type": "text", "text": "Count"}]}]}


@pytest.fixture
def result() -> Any:
    """What the tool returns."""
    return {"n": BIG, "ratio": float("nan")}


@pytest.fixture
async def client(configured: Redis, result: Any) -> AsyncIterator[httpx.AsyncClient]:
    agent: Agent[Any, str] = Agent(scripted([*call("count", f'{{"n": {BIG}}}')], ["done"]))

    @agent.tool_plain
    def count(n: int) -> Any:
        return result

    app, store = FastAPI(), RedisSessions(ttl=60)
    for make, prefix in ((make_vercel_ai_router, "/chat"), (make_ag_ui_router, "/ag-ui"), (make_router, "/api")):
        app.include_router(make(agent, authorize=lambda: (1, 1), sessions=store), prefix=prefix)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        asked = await client.post("/chat", json=QUESTION)
        assert "finish" in asked.text
        yield client


async def test_a_reloaded_page_has_integers_as_exact_as_the_live_one(client: httpx.AsyncClient) -> None:
    (part,) = [
        part
        for message in (await client.get("/chat/s")).json()["messages"]
        for part in message["parts"]
        if "toolCallId" in part
    ]
    assert part["input"] == {"n": str(BIG)}
    shown = {"n": str(BIG), "ratio": None}
    assert part["output"] == shown
    messages = (await client.get("/api/sessions/s/messages")).json()["messages"]
    (returned,) = [part for message in messages for part in message["parts"] if part["part_kind"] == "tool-return"]
    assert returned["content"] == shown


@pytest.mark.parametrize("result", [pytest.param(10**4_400, id="4401-digits")])
async def test_a_number_that_no_parser_reads_leaves_the_conversation_readable(
    client: httpx.AsyncClient, result: int
) -> None:
    text = (await client.get("/chat/s")).text
    assert hex(result) in text
    assert "done" in text


# Not from `add()`: another client of Redis wrote them.
FOREIGN: list[tuple[str, str, Any]] = [
    ("event", "pydantic-ai", {"event": "part_delta", "event_idx": "first"}),
    ("event", "pydantic-ai", {"event": "part_start", "part_kind": "text", "event_idx": [1]}),
    ("event", "pydantic-ai", {"event": "part_start", "part_kind": "file", "data": "***"}),
    ("event", "pydantic-ai", {"event": "part_start", "part_kind": "tool-return", "tool_outcome": ["ok"]}),
    ("event", "pydantic-ai", {"event": "answer", "tool_name": 5, "tool_call_id": [6]}),
    ("event", "pydantic-ai", {"event": "custom", "kind": ["custom"]}),
    ("info", "prompt", {}),
    ("info", "prompt", {"prompt": 5, "after": "all", "stamp": None}),
    ("info", "deferred", {"approvals": {"a": 5}, "calls": [1]}),
    ("error", "opale", {"msg": {"a": 1}, "code": 7}),
    ("resume", "opale", {"void": {"idx": "a"}}),
]
PAGES = ["/chat/s", "/api/sessions/s/messages", "/api/sessions/s/events", "/ag-ui/connect", "/chat/s/stream?run={run}"]


async def test_what_others_wrote_to_a_stream_breaks_no_page(client: httpx.AsyncClient, configured: Redis) -> None:
    begin, *rest = await configured.xrange("agx:1:1:s")
    await configured.delete("agx:1:1:s")
    foreign = [{"type": kind, "origin": origin, "body": json.dumps(body)} for kind, origin, body in FOREIGN]
    odd_end = {"type": "end", "origin": "opale", "body": json.dumps({"outcome": ["x"]})}
    for fields in (begin[1], *foreign, *(fields for _, fields in rest), odd_end):
        await configured.xadd("agx:1:1:s", fields)
    await configured.expire("agx:1:1:s", 60)
    run = (await client.get("/chat/s")).json()["run_id"]
    for page in PAGES:
        post = page.endswith("connect")
        answer = await (
            client.post(page, json={"threadId": "s", "runId": "r"}) if post else client.get(page.format(run=run))
        )
        assert answer.status_code == 200
        assert "done" in answer.text


LONE = "\\ud83d"  # as JSON has it
UNREADABLE = {
    "/chat": QUESTION | {"messages": [{"id": "m", "role": "user", "parts": [{"type": "text", "text": "LONE"}]}]},
    "/ag-ui": {"threadId": "s", "runId": "LONE", "messages": [{"id": "m", "role": "user", "content": "Hi"}]},
    "/ag-ui/connect": {"threadId": "s", "runId": "LONE"},
    "/api/sessions/s/runs": {"prompt": "LONE"},
}


@pytest.mark.parametrize("page", UNREADABLE)
async def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(client: httpx.AsyncClient, page: str) -> None:
    body = json.dumps(UNREADABLE[page])
    json_type = {"Content-Type": "application/json"}
    refused = await client.post(page, content=body.replace("LONE", LONE), headers=json_type)
    assert (refused.status_code, refused.json()["code"]) == (422, "request_unreadable")
    whole = body.replace("LONE", LONE + "\\ude00").replace('"s"', '"other"').replace("/s/", "/other/")
    assert (await client.post(page, content=whole, headers=json_type)).status_code in (200, 202)
