"""A process that stops while sub-agents work: their tools begin again, and what they had done counts for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, call, prompts, scripted
from support.recorded import check_seq, of_kind, read_facts, read_stream
from support.waiting import wait_until

import agx
from agx.facts.schema import NodeEnded, RunEnded
from agx.listeners.replay import replay
from agx.listeners.replayed_run import SubAgentEvent
from agx.listeners.void import ResumeEvent


async def test_a_tool_that_is_called_again_has_new_sub_agents(configured: Redis) -> None:
    asking = asyncio.Event()

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        yield f"{prompts(messages)[-1]}: "
        if not asking.is_set():
            asking.set()
            await asyncio.Event().wait()
        yield "here"

    inner: Agent[ScopeDeps, str] = Agent(
        FunctionModel(stream_function=answer), name="inner", deps_type=ScopeDeps, capabilities=[agx.AgxCapability()]
    )
    outer: Agent[ScopeDeps, str] = Agent(
        scripted([*call("ask", '{"q": "where"}'), *call("quick", index=1, call_id="c2")], ["done"]),
        name="outer",
        deps_type=ScopeDeps,
    )

    @outer.tool(metadata={"on_resume": "retry"})
    async def ask(ctx: RunContext[ScopeDeps], q: str) -> str:
        return (await inner.run(q, deps=ctx.deps)).output

    @outer.tool
    async def quick(ctx: RunContext[ScopeDeps]) -> str:
        return (await Agent(scripted(["q"]), name="fast", capabilities=[agx.AgxCapability()]).run("hi")).output

    async def recipe(job: agx.Job) -> agx.Call:
        ids = {"scope": job.scope_id, "user_id": job.user_id, "session_id": job.session_id}
        return agx.Call(FakeSession(), outer, ScopeDeps(**ids))

    first, second = agx.Worker({"outer": recipe}, grace=0), agx.Worker({"outer": recipe})
    running = asyncio.create_task(first.run())
    await agx.submit("1", "1", "s", agent="outer", prompt="Hi")
    await asking.wait()
    await wait_until(partial(_has_return, configured))
    live = asyncio.create_task(_replay())
    first.stop()
    await running
    running = asyncio.create_task(second.run())
    seen = await live
    entries = await read_stream(configured)
    check_seq(entries)
    runs = {entry.body["run"]: entry.body["agent"] for entry in entries if entry.origin == "sub-agent"}
    assert sorted(runs.values()) == ["fast", "inner", "inner"]
    void, again = (run for run, agent in runs.items() if agent == "inner")
    (resume,) = [entry.body for entry in entries if entry.type == "resume"]
    assert (resume["void"], resume["void_runs"]) == (None, [void])
    # What was given before is named; what is read later has none of it.
    assert {one.run for one in seen if isinstance(one, SubAgentEvent)} == set(runs)
    assert [one.run for one in seen if isinstance(one, SubAgentEvent) and one.end and one.end.get("void")] == [void]
    # Pages take a `ResumeEvent` for an answer that is void, and the calls of this one count.
    assert not any(isinstance(one, ResumeEvent) for one in seen)
    later = await _replay()
    assert {one.run for one in later if isinstance(one, SubAgentEvent)} == set(runs) - {void}
    assert not any(isinstance(one, ResumeEvent) for one in later)
    second.stop()
    await running
    # A process that stops by itself has queued its facts.
    facts = [fact for fact in await read_facts(configured) if getattr(fact, "run_id", None) in (void, again)]
    assert [fact.run_id for fact in of_kind(NodeEnded, facts) if fact.model is not None] == [void, again]
    ends = {fact.run_id: fact.outcome for fact in of_kind(RunEnded, facts)}
    assert ends == {void: "cancelled", again: "completed"}
    assert {entry.body["run"] for entry in entries if entry.name == "run-end"} >= {again}


async def _has_return(client: Redis) -> bool:
    return any(entry.body.get("part_kind") == "tool-return" for entry in await read_stream(client))


async def _replay() -> list[Any]:
    return [event async for event in replay("1", "1", "s", wait=30)]
