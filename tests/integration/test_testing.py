"""`agx.testing`: what it offers to users' own tests, used as they would."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic_ai import Agent, AgentRunResult, AgentRunResultEvent
from pydantic_ai.models.test import TestModel
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

import agx
from agx.testing import MemorySession, PacedModel, collect, embedded_redis


@dataclass
class Deps(agx.Deps):
    def get_scope_id(self) -> int:
        return 1


async def test_a_users_test() -> None:
    with embedded_redis() as url:
        async with Redis.from_url(url) as client:
            agx.configure(agx.Config(redis=client))
            session = MemorySession("s")
            agent = Agent(TestModel(custom_output_text="hello"), deps_type=Deps)
            running = asyncio.create_task(agx.run(session, agent, "hi", Deps(user_id=1, session_id="s")))
            events = await collect(1, 1, "s")
            assert (await running).output == "hello"
            assert (events[0]["type"], events[-1]["type"]) == ("begin", "end")
            await agx.aclose()

            later = MemorySession("s", store=session.store)
            await later.load()
            assert later.msgs == session.msgs
            assert len(later.msgs) == 2
    with SyncRedis.from_url(url) as gone, pytest.raises(RedisConnectionError):
        gone.ping()


async def test_collect_says_when_there_is_no_end(configured: Redis) -> None:
    await agx.start(1, 1, "open")
    with pytest.raises(TimeoutError, match="open"):
        await collect(1, 1, "open", timeout=0.1)
    await agx.stop(1, 1, "open")
    assert [event["type"] for event in await collect(1, 1, "open")] == ["begin", "end"]


async def test_the_paced_model_calls_a_tool_that_is_named_and_answers_as_long_as_it_is_asked_to() -> None:
    agent = Agent(PacedModel(pause=0))

    @agent.tool_plain
    def roll_dice(sides: int = 6) -> int:
        return 4

    @agent.tool_plain
    def roll_back(to: str) -> None:
        raise AssertionError("it needs an argument")

    async def ask(prompt: str, **more: Any) -> AgentRunResult[str]:
        async with agent.run_stream_events(prompt, **more) as events:
            async for event in events:
                if isinstance(event, AgentRunResultEvent):
                    return event.result
        raise AssertionError("it has no result")

    rolled = await ask("Roll a die")
    assert rolled.output == "roll_dice returned 4. "
    again = await ask("Roll it again", message_history=rolled.all_messages())
    assert again.output == "roll_dice returned 4. "
    short, long = await ask("Hello"), await ask("Tell me something long")
    assert len(short.output.split()) < 20
    assert len(long.output.split()) > 400
