"""docs/how-to/approve.md: its agent and worker, and the function that decides."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_ai.messages import ModelRequest, ToolReturnPart
from redis.asyncio import Redis
from support.agents import call, scripted
from support.docs import every_block
from support.waiting import wait_until

import agx


async def test_every_block(configured: Redis) -> None:
    page: dict[str, Any] = {}
    with every_block("docs/how-to/approve.md") as blocks:
        exec(blocks.take("python"), page)
        exec(blocks.take("python"), page)
    calls = [
        *call("refund", '{"order": "7", "euros": 20}', call_id="c1"),
        *call("refund", '{"order": "8", "euros": 90}', call_id="c2", index=1),
        *call("count_stock", '{"article": "tea"}', call_id="c3", index=2),
    ]
    with page["agent"].override(model=scripted(calls, ["Done"])):
        working = asyncio.create_task(page["worker"].run())
        await agx.submit("acme", "ada", "chat-1", agent="shop", prompt="Refund both")
        await wait_until(lambda: agx.pending("acme"))
        await wait_until(is_over)
        assert await page["decide_all"]("eve", {"tea": 40}) is not None
        await wait_until(lambda: returned(3))
        page["worker"].stop()
        await working
    assert await returned(3) == {
        "c1": "20 euros of order 7 are refunded",
        "c2": "The tool call was denied.",
        "c3": 40,
    }
    assert await agx.pending("acme") == []


async def is_over() -> bool:
    return not await agx.is_live("acme", "ada", "chat-1")


async def returned(count: int) -> dict[str, Any] | None:
    """Return what the model got for its calls, once it has so many."""
    session = agx.RedisSession("acme", "ada", "chat-1")
    await session.load()
    parts = [part for message in session.msgs if isinstance(message, ModelRequest) for part in message.parts]
    found = {part.tool_call_id: part.content for part in parts if isinstance(part, ToolReturnPart)}
    return found if len(found) == count else None
