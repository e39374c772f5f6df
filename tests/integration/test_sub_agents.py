"""The events of sub-agents are on the stream of the run that called them, each with tags that name its sub-agent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import Hooks
from pydantic_ai.exceptions import RunCancelled
from redis.asyncio import Redis
from support.agents import Gate, ScopeDeps, call, complete, scripted
from support.delegating import Delegating, delegating, observed
from support.recorded import Entry, check_seq, of_kind, read_facts, read_stream, text_of

import agx
from agx.facts.schema import RunEnded
from agx.testing import MemorySession

TAGS = ("run", "parent_run", "agent", "parent_tool_call_id", "depth")


def nested(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Return the events of each sub-agent, by its run."""
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.origin == "sub-agent":
            runs.setdefault(entry.body["run"], []).append(entry)
    return runs


async def test_parallel_sub_agents_two_levels_deep(configured: Redis) -> None:
    leaf = delegating("leaf", **observed())
    middle = delegating("middle", leaf, calls=3, **observed())
    await agx.run(MemorySession(id="s"), delegating("top", middle, calls=3), "q", deps=ScopeDeps())
    entries = await read_stream(configured)
    check_seq(entries)
    top = entries[0].body["run_id"]
    runs = nested(entries)
    assert len(runs) == 3 + 9
    tags: dict[str, dict[str, Any]] = {}
    for run, events in runs.items():
        found = [{name: entry.body[name] for name in TAGS} for entry in events]
        tags[run] = found[0]
        assert found == [found[0]] * len(found)
        assert [entry.type for entry in events] == ["event"] * len(events)
        assert events[0].name == "run-begin"
        assert (events[-1].name, events[-1].body["outcome"]) == ("run-end", "completed")
    for run, found in tags.items():
        parent = tags.get(found["parent_run"])
        assert (found["depth"], found["agent"]) == ((1, "middle") if parent is None else (2, "leaf"))
        assert parent is not None or found["parent_run"] == top
        # The call that it is in has the question that it answers.
        caller = runs[found["parent_run"]] if parent is not None else entries
        (question,) = [
            entry.body["args"]["question"]
            for entry in caller
            if entry.body.get("part_kind") == "tool-call"
            and entry.body["tool_call_id"] == found["parent_tool_call_id"]
            and entry.body.get("run") == (None if parent is None else found["parent_run"])
        ]
        text = [entry.body for entry in runs[run] if entry.body.get("part_kind") == "text"]
        joined = "".join(body.get("content", "") + body.get("content_delta", "") for body in text)
        assert joined == f"{found['agent']} answers {question}"


async def test_a_client_that_shows_one_origin_shows_what_it_showed(configured: Redis) -> None:
    """The same agents with and without the events of sub-agents: the run's own are the same."""
    shown = []
    for kwargs in ({"streams": False}, observed()):
        middle = delegating("middle", delegating("leaf", **kwargs), **kwargs)
        await agx.run(MemorySession(id="s"), delegating("top", middle), "q", deps=ScopeDeps())
        entries = await read_stream(configured)
        own = [entry for entry in entries if entry.origin == "pydantic-ai"]
        steps = [
            tuple(entry.body.get(name) for name in ("event", "idx", "part_kind", "tool_call_id", "args"))
            for entry in own
            if entry.name != "part_delta"
        ]
        shown.append((steps, text_of(entries), [entry.type for entry in entries if entry.origin != "sub-agent"][-1]))
        assert len(nested(entries)) == (2 if "capabilities" in kwargs else 0)
    assert shown[0] == shown[1]


@pytest.mark.parametrize("streams", [True, False])
async def test_a_sub_agent_streams_where_its_model_can(configured: Redis, streams: bool) -> None:
    model = scripted(["a", "b", "c"])
    inner: Delegating = Agent(model if streams else complete(model), deps_type=ScopeDeps, name="inner", **observed())
    outer: Delegating = Agent(scripted([*call("ask")], ["x"]), deps_type=ScopeDeps)

    @outer.tool
    async def ask(ctx: RunContext[ScopeDeps]) -> str:
        return (await inner.run("hi", deps=ctx.deps)).output

    await agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps())
    entries = await read_stream(configured)
    (events,) = nested(entries).values()
    starts = [entry.body["content"] for entry in events if entry.name == "part_start"]
    assert starts == (["a"] if streams else ["abc"])
    first = of_kind(RunEnded, await read_facts(configured))
    assert [(run.parent_run_id is None, run.first_text_ns is None) for run in first] == [(False, True), (True, False)]
    top = first[-1]
    assert top.stream is not None
    assert top.stream.events == len(entries)
    assert {event.name for event in top.events}.isdisjoint({"run-begin", "run-end"})


async def test_a_sub_agent_that_fails(configured: Redis) -> None:
    inner: Delegating = Agent(scripted(["a", ValueError("secret")]), deps_type=ScopeDeps, **observed())
    outer: Delegating = Agent(scripted([*call("ask")], ["x"]), deps_type=ScopeDeps)

    @outer.tool
    async def ask(ctx: RunContext[ScopeDeps]) -> str:
        with pytest.raises(ValueError, match="secret"):
            await inner.run("hi", deps=ctx.deps)
        return "it failed"

    await agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps())
    (events,) = nested(entries := await read_stream(configured)).values()
    end = events[-1].body
    assert (end["event"], end["outcome"], end["error_type"]) == ("run-end", "failed", "ValueError")
    assert "secret" not in str([entry.body for entry in entries])
    assert [entry.type for entry in entries].count("error") == 0


async def test_a_cancel_reaches_all_sub_agents(configured: Redis) -> None:
    """Those that a tool awaits, one level down and two, in parallel; and one in a task that no tool awaits."""
    gates = [Gate() for _ in range(4)]
    leaves = [Agent(scripted(["a", gate]), deps_type=ScopeDeps, name="leaf", **observed()) for gate in gates]
    middle: Delegating = Agent(
        scripted([*call("ask", index=0), *call("ask", index=1, call_id="c2")]), deps_type=ScopeDeps, **observed()
    )
    outer: Delegating = Agent(
        scripted(
            [*call("direct", index=0), *call("deep", index=1, call_id="c2"), *call("aside", index=2, call_id="c3")]
        ),
        deps_type=ScopeDeps,
    )
    waiting, background = iter(leaves), []

    @middle.tool
    async def ask(ctx: RunContext[ScopeDeps]) -> str:
        return (await next(waiting).run("hi", deps=ctx.deps)).output

    @outer.tool
    async def direct(ctx: RunContext[ScopeDeps]) -> str:
        return (await next(waiting).run("hi", deps=ctx.deps)).output

    @outer.tool
    async def deep(ctx: RunContext[ScopeDeps]) -> str:
        return (await middle.run("hi", deps=ctx.deps)).output

    @outer.tool
    async def aside(ctx: RunContext[ScopeDeps]) -> str:
        background.append(asyncio.create_task(next(waiting).run("hi", deps=ctx.deps)))
        return "begun"

    running = asyncio.create_task(agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps()))
    await asyncio.gather(*(gate.reached.wait() for gate in gates))
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    assert isinstance(*await asyncio.gather(*background, return_exceptions=True), RunCancelled)
    entries = await read_stream(configured)
    check_seq(entries)
    assert entries[-1].type == "end"
    ends = [entry.body["outcome"] for entry in entries if entry.name == "run-end"]
    assert ends == ["cancelled"] * 4  # the fifth ended behind the `end`
    facts = of_kind(RunEnded, await read_facts(configured))
    assert [(fact.outcome, fact.reason) for fact in facts] == [("cancelled", "cancel")] * 6


async def test_what_is_no_sub_agent_of_a_tool_is_not_streamed(configured: Redis) -> None:
    """The steps of an agent in a hook, such as a guard, are not for listeners."""
    guard: Delegating = Agent(complete(scripted(["fine"])), deps_type=ScopeDeps, name="guard", **observed())
    hooks: Hooks[ScopeDeps] = Hooks()

    @hooks.on.before_run
    async def check(ctx: RunContext[ScopeDeps]) -> None:
        await guard.run("hi", deps=ctx.deps)

    outer: Delegating = Agent(scripted(["x"]), deps_type=ScopeDeps, capabilities=[hooks])
    await agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps())
    assert not nested(await read_stream(configured))
    facts = of_kind(RunEnded, await read_facts(configured))
    assert [fact.agent for fact in facts if fact.parent_run_id is not None] == ["guard"]
