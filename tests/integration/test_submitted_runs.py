"""A router that is made with a recipe's name submits its runs to the workers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import FakeSession, Gate, ScopeDeps, scripted
from support.workers import make_recipe, working

import agx
from agx.sessions.redis_session import RedisSessions
from agx.web import make_router, router

WHO = ("acme", "ada")


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(make_router("helper", authorize=lambda: WHO, sessions=RedisSessions()))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


async def start(client: httpx.AsyncClient, status: int = 202) -> dict[str, Any]:
    answer = await client.post("/sessions/s/runs", json={"prompt": "Hi"})
    assert answer.status_code == status
    body: dict[str, Any] = answer.json()
    return body


async def test_a_run_begins_on_a_worker(configured: Redis, client: httpx.AsyncClient) -> None:
    async with working(agx.Worker({"helper": make_recipe()})):
        started = await start(client)
        assert started["begun"]
        events = await client.get("/sessions/s/events")
    assert started["run_id"] in events.text
    assert '"outcome":"completed"' in events.text


async def test_a_prompt_that_a_worker_has_not_stored_yet_is_shown(configured: Redis, client: httpx.AsyncClient) -> None:
    gate = Gate()
    agent = Agent(scripted([gate, "Hello"]), deps_type=ScopeDeps, name="helper")

    async def recipe(job: agx.Job) -> agx.Call:
        deps = ScopeDeps(scope=job.scope_id, user_id=job.user_id, session_id=job.session_id)
        return agx.Call(FakeSession(), agent, deps)  # it stores nothing where the router reads

    async with working(agx.Worker({"helper": recipe})):
        await start(client)
        await gate.reached.wait()
        (message,) = (await client.get("/sessions/s/messages")).json()["messages"]
        assert message["parts"][0]["content"] == "Hi"
        gate.open.set()
        await client.get("/sessions/s/events")


async def test_a_run_that_still_waits_is_said(
    configured: Redis, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_MOST", 0.15)
    assert not (await start(client))["begun"]


async def test_a_full_queue_is_a_429(
    redis_url: str, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_MOST", 0.0)
    async with Redis.from_url(redis_url) as redis:
        agx.configure(agx.Config(redis=redis, max_waiting_jobs=1))
        await start(client)
        assert (await start(client, status=429))["code"] == "queue_full"
        await agx.aclose()


@pytest.mark.parametrize("options", [{"usage_limits": None}, {"recipes": {}}, {"make_deps": ScopeDeps}])
def test_what_belongs_in_the_recipe_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="recipe"):
        make_router("helper", authorize=lambda: WHO, sessions=RedisSessions(), **options)
