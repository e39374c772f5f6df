"""However an agent is driven, it tells the same: events, facts and spans (contract, section 3, `AgxCapability`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from redis.asyncio import Redis
from support.agents import Gate, ScopeDeps, call, complete, scripted, think
from support.recorded import check_seq, of_kind, read_facts, read_stream, text_of
from support.sdk import SpanLedger, installed_sdk
from support.waiting import wait_until

import agx
from agx.facts.schema import (
    NodeEnded,
    RunEnded,
    RunStarted,
    ToolEnded,
)
from agx.testing import MemorySession

Driven = Agent[ScopeDeps, str]


def make_agent(*gates: Gate, **kwargs: Any) -> Driven:
    """Return an agent that thinks, calls two tools (one asks it to try again) and answers."""
    agent: Driven = Agent(
        scripted(
            [
                *think("let me", " see"),
                *call("add", '{"a": 1,', ' "b": 2}', index=1),
                *call("guess", index=2, call_id="c2"),
            ],
            [*gates, "th", "ree"],
        ),
        deps_type=ScopeDeps,
        name="driven",
        **kwargs,
    )

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    @agent.tool_plain
    def guess(n: int = 0) -> str:
        from pydantic_ai import ModelRetry

        raise ModelRetry("no")

    return agent


def observed_agent(*gates: Gate, **kwargs: Any) -> Driven:
    return make_agent(*gates, capabilities=[agx.AgxCapability(**kwargs)])


async def by_agx_run() -> None:
    await agx.run(MemorySession(id="s"), make_agent(), "hi", deps=ScopeDeps())


async def by_agx_run_of_an_observed_agent() -> None:
    await agx.run(MemorySession(id="s"), observed_agent(), "hi", deps=ScopeDeps())


async def by_run() -> None:
    assert (await observed_agent().run("hi", deps=ScopeDeps())).output == "three"


async def by_run_with_ids() -> None:
    await observed_agent(scope_id=1, user_id=1, session_id="s").run("hi", deps=ScopeDeps(session_id="another"))


async def by_run_with_a_capability_per_run() -> None:
    await make_agent().run("hi", deps=ScopeDeps(), capabilities=[agx.AgxCapability()])


async def by_run_with_both() -> None:
    await observed_agent().run("hi", deps=ScopeDeps(), capabilities=[agx.AgxCapability()])


async def by_run_stream() -> None:
    async with observed_agent().run_stream("hi", deps=ScopeDeps()) as result:
        assert [text async for text in result.stream_text(delta=True, debounce_by=None)]


async def by_run_stream_events() -> None:
    async with observed_agent().run_stream_events("hi", deps=ScopeDeps()) as events:
        assert [event async for event in events]


async def by_iter() -> None:
    async with observed_agent().iter("hi", deps=ScopeDeps()) as run:
        assert [node async for node in run]


async def by_next() -> None:
    async with observed_agent().iter("hi", deps=ScopeDeps()) as run:
        node: Any = run.next_node
        while not Agent.is_end_node(node):
            node = await run.next(node)


async def by_node_stream() -> None:
    async with observed_agent().iter("hi", deps=ScopeDeps()) as run:
        async for node in run:
            if Agent.is_model_request_node(node):
                async with node.stream(run.ctx) as stream:
                    assert [event async for event in stream]
            elif Agent.is_call_tools_node(node):
                async with node.stream(run.ctx) as tools:
                    async for _ in tools:
                        pass


MODES: list[Callable[[], Awaitable[None]]] = [
    by_agx_run,
    by_agx_run_of_an_observed_agent,
    by_run,
    by_run_with_ids,
    by_run_with_a_capability_per_run,
    by_run_with_both,
    by_run_stream,
    by_run_stream_events,
    by_iter,
    by_next,
    by_node_stream,
]


@pytest.fixture(params=["sdk", "no sdk"])
def spans(request: pytest.FixtureRequest) -> Iterator[SpanLedger | None]:
    with installed_sdk() if request.param == "sdk" else contextlib.nullcontext() as ledger:
        yield ledger


def span_tree(spans: SpanLedger) -> list[tuple[str, str | None]]:
    return sorted((span.name, spans.parent_name(span)) for span in spans.ended)


@pytest.mark.parametrize("drive", MODES)
async def test_events_facts_and_spans_are_the_same(
    configured: Redis, spans: SpanLedger | None, drive: Callable[[], Awaitable[None]]
) -> None:
    await drive()
    entries = await read_stream(configured)
    check_seq(entries)
    assert (text_of(entries, "thinking"), text_of(entries)) == ("let me see", "three")
    said = [(e.name, e.body.get("idx"), e.body.get("part_kind")) for e in entries if e.name != "part_delta"]
    called = [("part_start", 0, "tool-return")] * 2
    assert said == [
        ("begin", None, None),
        ("llm-begin", 0, None),
        ("part_start", 0, "thinking"),
        ("part_start", 0, "tool-call"),
        ("part_start", 0, "tool-call"),
        ("llm-end", 0, None),
        *called,
        ("llm-begin", 1, None),
        ("part_start", 1, "text"),
        ("answer", 1, None),
        ("llm-end", 1, None),
        ("end", None, None),
    ]
    assert entries[-1].body["outcome"] == "completed"
    facts = await read_facts(configured)
    (start,), (end,) = of_kind(RunStarted, facts), of_kind(RunEnded, facts)
    assert (start.run_id, start.agent, start.scope, start.user, start.session) == (end.run_id, "driven", "1", "1", "s")
    assert (end.outcome, end.model_calls, end.tool_calls) == ("completed", 2, 2)
    nodes = [("user_prompt", 0), ("model_request", 0), ("call_tools", 0), ("model_request", 1), ("call_tools", 1)]
    if drive is by_run_stream:
        nodes.pop()  # pydantic-ai itself never runs the last one there
    assert [(n.node, n.idx, n.outcome) for n in of_kind(NodeEnded, facts)] == [(*node, "completed") for node in nodes]
    assert sorted((t.call_id, t.outcome) for t in of_kind(ToolEnded, facts)) == [("c1", "ok"), ("c2", "retry")]
    assert [fact.id for fact in facts] == list(dict.fromkeys(fact.id for fact in facts))
    models = [node.model for node in of_kind(NodeEnded, facts) if node.model]
    assert all(model.stream and model.first_chunk_ns is not None for model in models)
    assert end.trace.sdk is (spans is not None)
    if spans is not None:
        assert len(spans.started) == len(spans.ended)
        assert span_tree(spans) == [
            *sorted((f"agx.node {kind}", "invoke_agent driven") for kind, _ in nodes),
            ("agx.run driven", None),
            ("chat scripted", "agx.node model_request"),
            ("chat scripted", "agx.node model_request"),
            ("execute_tool add", "agx.node call_tools"),
            ("execute_tool guess", "agx.node call_tools"),
            ("invoke_agent driven", "agx.run driven"),
        ]


async def test_a_run_without_ids_is_observed_and_not_streamed(configured: Redis) -> None:
    agent: Agent[None, str] = Agent(complete(scripted(["a"])), name="free", capabilities=[agx.AgxCapability()])
    await agent.run("hi")

    async def ends() -> list[RunEnded]:
        return of_kind(RunEnded, await read_facts(configured))

    (end,) = await wait_until(ends)
    assert (end.outcome, end.user, end.session, end.stream) == ("completed", None, None, None)
    keys: list[Any] = await configured.keys("*")
    assert all(key.startswith(b"agx::") for key in keys), keys


async def test_only_some_of_the_ids_are_refused(configured: Redis) -> None:
    agent: Agent[None, str] = Agent(scripted(["a"]), capabilities=[agx.AgxCapability(scope_id=1, session_id="s")])
    with pytest.raises(ValueError, match="all of scope_id, user_id and session_id"):
        await agent.run("hi")
    assert await read_facts(configured) == []


@pytest.mark.parametrize("where", ["at the prompt", "in the model", "between"])
async def test_iter_left_early(configured: Redis, spans: SpanLedger | None, where: str) -> None:
    async with observed_agent().iter("hi", deps=ScopeDeps()) as run:
        async for node in run:
            if where == "at the prompt":
                break
            if where == "in the model" and Agent.is_model_request_node(node):
                async with node.stream(run.ctx) as stream:
                    async for _ in stream:
                        break
                break
            if where == "between" and Agent.is_call_tools_node(node):
                break
    entries = await read_stream(configured)
    check_seq(entries)
    assert [e.type for e in entries].count("begin") == [e.type for e in entries].count("end") == 1
    assert (entries[-1].body["outcome"], entries[-1].body["reason"]) == ("cancelled", "abandoned")
    assert (entries[-2].type, entries[-2].body["msg"]) == ("error", "canceled")
    (end,) = of_kind(RunEnded, await read_facts(configured))
    assert (end.outcome, end.reason) == ("cancelled", "abandoned")
    assert not await agx.is_live(1, 1, "s")
    if spans is not None:
        assert len(spans.started) == len(spans.ended)


@pytest.mark.parametrize("streams", [True, False], ids=["streaming", "not streaming"])
async def test_a_sub_agent_in_a_tool(configured: Redis, spans: SpanLedger | None, streams: bool) -> None:
    """It takes no lease and has no stream of its own; its facts and spans hang under the tool's."""
    model = scripted(["inner", " answer"])
    inner: Agent[ScopeDeps, str] = Agent(
        model if streams else complete(model),
        deps_type=ScopeDeps,
        name="inner",
        capabilities=[agx.AgxCapability()],
    )
    outer: Agent[ScopeDeps, str] = Agent(scripted([*call("ask")], ["outer"]), deps_type=ScopeDeps, name="outer")
    live: list[Any] = []

    @outer.tool
    async def ask(ctx: RunContext[ScopeDeps]) -> str:
        live.extend([found async for found in agx.q(1, 1)])
        if not streams:
            return (await inner.run("hi", deps=ctx.deps)).output
        async with inner.run_stream("hi", deps=ctx.deps) as streamed:
            return await streamed.get_output()

    await agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps())
    assert live == [(1, 1, "s")]
    entries = await read_stream(configured)
    check_seq(entries)
    assert text_of(entries) == "outer"
    assert [e.body["content"] for e in entries if e.body.get("part_kind") == "tool-return"] == ["inner answer"]
    assert [e.origin for e in entries if e.name == "llm-begin"] == ["pydantic-ai", "sub-agent", "pydantic-ai"]
    facts = await read_facts(configured)
    sub, top = of_kind(RunEnded, facts)
    assert (sub.agent, sub.parent_run_id, sub.session, sub.stream) == ("inner", top.run_id, None, None)
    assert (top.agent, top.parent_run_id, top.session) == ("outer", None, "s")
    assert (sub.scope, sub.trace.trace_id) == (top.scope, top.trace.trace_id)
    (tool,) = of_kind(ToolEnded, facts)
    inner_models = [n.model for n in of_kind(NodeEnded, facts) if n.run_id == sub.run_id and n.model]
    assert [model.stream for model in inner_models] == [streams]
    assert (top.model_calls, sub.model_calls) == (2, 1)
    if spans is None:
        assert sub.trace.parent_span_id == tool.trace.span_id
    else:
        tree = span_tree(spans)
        assert ("agx.run inner", "execute_tool ask") in tree
        assert ("invoke_agent inner", "agx.run inner") in tree
        assert len(spans.started) == len(spans.ended)


async def test_sub_agents_in_parallel_tools(configured: Redis) -> None:
    inner: Agent[ScopeDeps, str] = Agent(
        complete(scripted(["a"], ["b"])), deps_type=ScopeDeps, name="inner", capabilities=[agx.AgxCapability()]
    )
    outer: Agent[ScopeDeps, str] = Agent(
        scripted([*call("ask"), *call("ask", index=1, call_id="c2")], ["outer"]), deps_type=ScopeDeps, name="outer"
    )

    @outer.tool
    async def ask(ctx: RunContext[ScopeDeps]) -> str:
        return (await inner.run("hi", deps=ctx.deps)).output

    await agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps())
    facts = await read_facts(configured)
    subs = [run for run in of_kind(RunEnded, facts) if run.parent_run_id]
    tools = of_kind(ToolEnded, facts)
    assert len({sub.run_id for sub in subs}) == 2
    assert {sub.trace.parent_span_id for sub in subs} == {tool.trace.span_id for tool in tools}


async def test_a_cancel_reaches_the_sub_agent(configured: Redis) -> None:
    gate = Gate()
    inner: Agent[ScopeDeps, str] = Agent(
        complete(scripted(["a", gate])), deps_type=ScopeDeps, name="inner", capabilities=[agx.AgxCapability()]
    )
    outer: Agent[ScopeDeps, str] = Agent(scripted([*call("ask")]), deps_type=ScopeDeps, name="outer")

    @outer.tool
    async def ask(ctx: RunContext[ScopeDeps]) -> str:
        return (await inner.run("hi", deps=ctx.deps)).output

    running = asyncio.create_task(agx.run(MemorySession(id="s"), outer, "hi", deps=ScopeDeps()))
    await gate.reached.wait()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    facts = await read_facts(configured)
    assert {(run.agent, run.outcome, run.reason) for run in of_kind(RunEnded, facts)} == {
        ("inner", "cancelled", "cancel"),
        ("outer", "cancelled", "cancel"),
    }
    assert [(tool.tool, tool.outcome) for tool in of_kind(ToolEnded, facts)] == [("ask", "cancelled")]


async def test_a_second_drive_of_a_live_session_is_refused(configured: Redis) -> None:
    gate = Gate()
    running = asyncio.create_task(observed_agent(gate).run("hi", deps=ScopeDeps()))
    await gate.reached.wait()
    with pytest.raises(agx.SessionBusyError):
        await observed_agent().run("hi", deps=ScopeDeps())
    with pytest.raises(agx.SessionBusyError):
        await agx.run(MemorySession(id="s"), make_agent(), "hi", deps=ScopeDeps())
    gate.open.set()
    assert (await running).output == "three"
    (end,) = of_kind(RunEnded, await read_facts(configured))
    assert end.outcome == "completed"
