"""docs/how-to/busy.md: its two functions, and the words over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import Gate, scripted
from support.docs import every_block
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.redis_session import RedisSessions
from agx.testing import collect
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router


async def test_every_block(configured: Redis) -> None:
    page: dict[str, Any] = {}
    with every_block("docs/how-to/busy.md") as blocks:
        exec(blocks.take("python"), page)

    async def make_writer(job: agx.Job) -> agx.Call:
        ids = (job.scope_id, job.user_id, job.session_id)
        deps = page["ChatDeps"](user_id=job.user_id, session_id=job.session_id)
        return agx.Call(agx.RedisSession(*ids), Agent(TestModel(custom_output_text="Instead"), name="writer"), deps)

    worker = agx.Worker({"writer": make_writer})
    working = asyncio.create_task(worker.run())
    gate = Gate()
    with page["agent"].override(model=scripted(["One"], ["Two"], ["Half", gate])):
        assert await asyncio.gather(page["ask"]("s", "1"), page["ask"]("s", "2")) == ["One", "Two"]
        stopped = asyncio.create_task(page["ask"]("s", "3"))
        await gate.reached.wait()
        run_id = await page["ask_instead"]("s", "4")
        with pytest.raises(agx.AgxCanceledError):
            await stopped
    await wait_until(lambda: has_begun(run_id))
    assert (await collect("acme", "ada", "s"))[-1]["body"]["outcome"] == "completed"
    worker.stop()
    await working


async def has_begun(run_id: str) -> bool:
    first = await current_engine().control.execute("XRANGE", "agx:acme:ada:s", "-", "+", "COUNT", 1)
    return run_id.encode() in first[0][1][b"body"]


async def test_over_http(configured: Redis) -> None:
    gate = Gate()
    agent = Agent(scripted(["Hello", gate], ["Steered"], ["Queued"], ["Chat"], ["AG-UI"]), name="a")
    app, given = FastAPI(), {"authorize": lambda: ("acme", "ada"), "sessions": RedisSessions()}
    app.include_router(make_router(agent, **given), prefix="/api")  # type: ignore[arg-type]
    app.include_router(make_vercel_ai_router(agent, **given), prefix="/chat")  # type: ignore[arg-type]
    app.include_router(make_ag_ui_router(agent, **given), prefix="/ag-ui")  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

        def ask(**fields: Any) -> Any:
            return client.post("/api/sessions/s/runs", json={"prompt": "Hi"} | fields)

        live = (await ask()).json()["run_id"]
        await gate.reached.wait()
        assert (await ask()).status_code == 409
        assert (await ask(on_busy="wait")).status_code == 422
        assert (await ask(on_busy="steer")).json()["run_id"] == live
        message = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}
        chat = {"id": "s", "messages": [message]}
        ag_ui = {"threadId": "s", "runId": "r", "messages": [{"id": "m", "role": "user", "content": "Hi"}]}
        for path, body, word in (
            ("/chat", chat, {"onBusy": "wait"}),
            ("/ag-ui", ag_ui, {"forwardedProps": {"onBusy": "wait"}}),
        ):
            assert (await client.post(path, json=body)).status_code == 409
            assert (await client.post(path, json=body | word)).status_code == 422
        waiting = []
        for number, request in enumerate(
            (
                ask(on_busy="enqueue"),
                client.post("/chat", json=chat | {"onBusy": "enqueue"}),
                client.post("/ag-ui", json=ag_ui | {"forwardedProps": {"onBusy": "enqueue"}}),
            )
        ):
            waiting.append(asyncio.create_task(request))
            await wait_until(lambda n=number: len(current_engine().lines.get("agx:acme:ada:s", ())) > n)  # type: ignore[misc]
        gate.open.set()
        queued, answered, spoken = await asyncio.gather(*waiting)
        assert queued.json()["run_id"] != live
        assert "Chat" in answered.text
        assert "AG-UI" in spoken.text
