"""docs/how-to/conversations.md: its functions, and the same over HTTP; another answer keeps the old one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Header
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, ToolCallPart, UserPromptPart
from redis.asyncio import Redis
from support.agents import Gate, call, scripted
from support.docs import every_block
from support.waiting import wait_until

import agx
from agx.redis_session import RedisSessions
from agx.testing import collect
from agx.web import make_router, make_vercel_ai_router


class ChatDeps(agx.Deps):
    def get_scope_id(self) -> str:
        return "acme"


async def ask(session: str, prompt: str, answer: str) -> None:
    agent = Agent(scripted([answer]), deps_type=ChatDeps)
    await agx.run(agx.RedisSession("acme", "ada", session), agent, prompt, ChatDeps(user_id="ada", session_id=session))


async def read(session: str) -> list[str]:
    stored = agx.RedisSession("acme", "ada", session)
    await stored.load()
    return texts(stored.msgs)


def texts(messages: list[ModelMessage]) -> list[str]:
    return [str(part.content) for message in messages for part in message.parts if hasattr(part, "content")]


async def test_every_block(configured: Redis) -> None:
    page: dict[str, Any] = {}
    with every_block("docs/how-to/conversations.md") as blocks:
        exec(blocks.take("python"), page)
    await ask("s", "One?", "1")
    await ask("s", "Two?", "2")
    await page["name"]("ada", "s", "Numbers")
    branch = await page["branch"]("ada", "s", 2)
    assert await page["read_titles"]("ada") == ["One?", "Numbers"]
    assert await page["read_titles"]("ada", "NUMB") == ["Numbers"]
    assert await page["read_titles"]("bob") == []
    assert await page["delete"]("ada", "s")
    assert not await page["delete"]("ada", "s")
    assert (await read("s"), await read(branch)) == ([], ["One?", "1"])


@pytest.fixture
async def client(configured: Redis) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the router and of the chat routes, in this loop, as Ada unless it says `user`."""

    def authorize(user: str = Header("ada")) -> tuple[str, str]:
        return "acme", user

    agent = Agent(scripted(["1"], ["another 1"]), name="a", instructions="Count.")
    app, given = FastAPI(), {"authorize": authorize, "sessions": RedisSessions()}
    app.include_router(make_router(agent, **given), prefix="/api")  # type: ignore[arg-type]
    app.include_router(make_vercel_ai_router(agent, **given), prefix="/chat")  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def listed(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get("/api/sessions", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["conversations"]  # type: ignore[no-any-return]


async def test_over_http(client: httpx.AsyncClient) -> None:
    await ask("s", "One?", "1")
    assert (await client.put("/api/sessions/s/title", json={"title": " Numbers\0 "})).status_code == 204
    branch = await client.post("/api/sessions/s/branches", json={"messages": 1, "branch_id": "b"})
    assert (branch.status_code, branch.json()) == (201, {"session_id": "b"})
    assert [(one["session_id"], one["title"], one["live"], one["parent"]) for one in await listed(client)] == [
        ("b", "One?", False, "s"),
        ("s", "Numbers", False, None),
    ]
    assert [one["session_id"] for one in await listed(client, search="numb")] == ["s"]
    assert [one["session_id"] for one in await listed(client, parent="s")] == ["b"]
    assert await listed(client, search="\0nothing") == []
    gate = Gate()
    running = asyncio.create_task(agx.run(*live("s", gate)))
    await gate.reached.wait()
    assert [one["live"] for one in await listed(client)] == [True, False]
    assert (await client.delete("/api/sessions/s")).status_code == 204
    with pytest.raises(agx.AgxCanceledError):
        await running
    assert [one["session_id"] for one in await listed(client)] == ["b"]
    assert (await client.get("/api/sessions/s/messages")).json()["messages"] == []


def live(session: str, gate: Gate) -> tuple[Any, ...]:
    deps = ChatDeps(user_id="ada", session_id=session)
    return agx.RedisSession("acme", "ada", session), Agent(scripted(["half", gate])), "Two?", deps


async def test_what_is_wrong_is_refused(client: httpx.AsyncClient) -> None:
    await ask("s", "One?", "1")
    await ask("other", "One?", "1")
    for headers, path in (({"user": "bob"}, "/api/sessions/s"), ({}, "/api/sessions/unknown")):
        tries = [
            client.put(f"{path}/title", json={"title": "mine"}, headers=headers),
            client.delete(path, headers=headers),
            client.post(f"{path}/branches", json={"messages": 1}, headers=headers),
        ]
        for answer in await asyncio.gather(*tries):
            assert (answer.status_code, answer.json()["code"]) == (404, "session_unknown")
    for title in ("", " ", "t" * 201, "\0", 1, None):
        assert (await client.put("/api/sessions/s/title", json={"title": title})).status_code == 422, title
    assert (await client.put("/api/sessions/s/title", content=b'{"title": "\\ud800"}')).status_code == 422
    for point in ({"messages": 0}, {"messages": 1, "branch_id": "a:b"}, {}):
        assert (await client.post("/api/sessions/s/branches", json=point)).status_code == 422, point
    for point in ({"messages": 3}, {"messages": 1, "branch_id": "other"}):
        refused = await client.post("/api/sessions/s/branches", json=point)
        assert (refused.status_code, refused.json()["code"]) == (409, "conversation_changed")
    for query in ({"limit": 0}, {"limit": 201}, {"search": "s" * 201}, {"parent": "a:b"}, {"offset": -1}):
        assert (await client.get("/api/sessions", params=query)).status_code == 422, query
    assert {one["session_id"]: one["title"] for one in await listed(client)} == {"s": "One?", "other": "One?"}


async def test_a_branch_counts_the_messages_that_are_shown(client: httpx.AsyncClient) -> None:
    """A call without a result is shown with one that the store does not have."""
    agent = Agent(scripted(call("work"), ["Done"]), deps_type=ChatDeps)
    agent.tool_plain(lambda: "worked", name="work")
    session = agx.RedisSession("acme", "ada", "s")
    await agx.run(session, agent, "Work", ChatDeps(user_id="ada", session_id="s"))
    cut_off = agx.RedisSession("acme", "ada", "cut")
    asked = ModelRequest(parts=[UserPromptPart("Hi")])
    cut_off.msgs = [asked, ModelResponse(parts=[ToolCallPart("work", {}, "lost")]), *session.msgs]
    await cut_off.save()
    shown = (await client.get("/api/sessions/cut/messages")).json()["messages"]
    assert len(shown) == 7
    kept = {}
    for count in range(1, 8):
        branch = await client.post("/api/sessions/cut/branches", json={"messages": count, "branch_id": f"b{count}"})
        kept[count] = len((await client.get(f"/api/sessions/b{count}/messages")).json()["messages"])
        assert branch.status_code == (201 if kept[count] else 409)
    assert kept == {1: 1, 2: 0, 3: 0, 4: 4, 5: 0, 6: 6, 7: 7}


async def test_another_answer_keeps_the_old_conversation(client: httpx.AsyncClient) -> None:
    message = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "One?"}]}
    for trigger in ("submit-message", "regenerate-message"):
        answer = await client.post("/chat", json={"id": "s", "messages": [message], "trigger": trigger})
        assert answer.status_code == 200, answer.text
        await collect("acme", "ada", "s")
    await wait_until(lambda: shows(["One?", "another 1"]))
    old, now = sorted(await listed(client), key=lambda one: one["session_id"] == "s")
    assert (now["session_id"], now["parent"], old["parent"]) == ("s", None, "s")
    assert await read(old["session_id"]) == ["One?", "1"]
    # A page that shows another conversation is refused, and nothing is stored.
    wrong = {**message, "parts": [{"type": "text", "text": "Two?"}]}
    refused = await client.post("/chat", json={"id": "s", "messages": [wrong], "trigger": "regenerate-message"})
    assert refused.status_code == 409
    assert len(await listed(client)) == 2


async def shows(expected: list[str]) -> bool:
    return await read("s") == expected
