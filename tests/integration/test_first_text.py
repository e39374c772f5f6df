"""The time to the first text that a listener gets: counted from the call, only for runs that showed some."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.function import FunctionModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, call, complete, scripted, think
from support.recorded import read_recorded

import agx
from agx.facts.schema import NodeEnded, RunEnded, RunStarted

THINKING_FIRST = scripted([*think("hm"), "Hel", "lo"])
CALLS_FIRST = scripted(call("work", "{}"), ["done"])


def agent_of(model: FunctionModel) -> Agent[Any, str]:
    agent: Agent[Any, str] = Agent(model, name="made")

    @agent.tool_plain
    def work() -> str:
        return "worked"

    return agent


@pytest.mark.parametrize("model", [THINKING_FIRST, complete(scripted(["whole"])), CALLS_FIRST])
async def test_it_lies_between_the_request_that_gave_it_and_the_end(configured: Redis, model: FunctionModel) -> None:
    await agx.run(FakeSession(), agent_of(model), "hi", deps=ScopeDeps())
    recorded = await read_recorded(configured)
    ended, started = recorded.one(RunEnded), recorded.one(RunStarted)
    requests = [node for node in recorded.of(NodeEnded) if node.model is not None]
    assert ended.first_text_ns is not None
    assert requests[-1].start_ns - started.start_ns <= ended.first_text_ns
    (begin,) = recorded.bodies("begin")
    assert ended.first_text_ns <= ended.end_ns - started.start_ns + (begin["waited_ms"] + 1) * 1_000_000


async def test_a_run_without_text_has_none(configured: Redis) -> None:
    agent = Agent(scripted(call("final_result", '{"response": 7}')), output_type=int, deps_type=ScopeDeps)
    await agx.run(FakeSession(), agent, "hi", deps=ScopeDeps())  # type: ignore[arg-type] # a name for output is enough
    assert (await read_recorded(configured)).one(RunEnded).first_text_ns is None


async def test_a_run_that_nobody_can_follow_has_none(configured: Redis) -> None:
    agent: Agent[None, str] = Agent(complete(scripted(["text"])), name="made", capabilities=[agx.AgxCapability()])
    await agent.run("hi")
    await agx.aclose()
    assert (await read_recorded(configured)).one(RunEnded).first_text_ns is None
