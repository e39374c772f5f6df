"""A model over real HTTP, with pydantic-ai's own OpenAI class: what it streams, refuses and breaks off."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from redis.asyncio import Redis
from support.agents import ScopeDeps
from support.model_server import (
    CleanCut,
    Finish,
    HardCut,
    ModelServer,
    Refusal,
    Silence,
    Text,
    ToolCall,
    call,
    say,
)
from support.recorded import Entry, check_seq, of_kind, read_facts, read_stream, text_of
from support.waiting import wait_until

import agx
from agx.facts.schema import (
    ModelCall,
    NodeEnded,
    RunEnded,
    ToolEnded,
)
from agx.testing import MemorySession

pytestmark = pytest.mark.usefixtures("configured")


def agent_with_tools(model: OpenAIChatModel) -> Agent[ScopeDeps, str]:
    agent: Agent[ScopeDeps, str] = Agent(model, deps_type=ScopeDeps, name="over-http")

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    return agent


async def run(model: OpenAIChatModel) -> MemorySession:
    session = MemorySession(id="s")
    await agx.run(session, agent_with_tools(model), "hi", deps=ScopeDeps())
    return session


async def check_recorded(client: Redis) -> tuple[list[Entry], list[ModelCall], RunEnded]:
    """Return the stream, the model calls that facts tell of, and how the run ended."""
    entries = await read_stream(client)
    check_seq(entries)
    facts = await read_facts(client)
    calls = [node.model for node in of_kind(NodeEnded, facts) if node.model is not None]
    (end,) = of_kind(RunEnded, facts)
    assert end.outcome == entries[-1].body["outcome"]
    assert end.model_calls == len(calls)
    return entries, calls, end


async def test_streaming(configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    model_server.script(say("one two three"))
    await run(http_model)
    entries, (model,), end = await check_recorded(configured)
    assert text_of(entries) == "one two three"
    assert end.outcome == "completed"
    assert (model.provider, model.request_model, model.response_model) == ("openai", "gpt-4o-mini", "gpt-4o-mini")
    assert (model.stream, model.finish_reason, model.finish_reason_missing) == (True, "stop", False)
    assert (model.usage.input, model.usage.output, model.usage.source) == (10, 3, "reported")
    assert model.response_id == "chatcmpl-test"
    assert model.first_chunk_ns is not None
    assert 0 < model.first_chunk_ns <= model.end_ns - model.start_ns
    assert sum(model.chunk_counts) >= 2


async def test_an_answer_is_streamed_before_it_is_whole(model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    model_server.script((Text("half"), Silence(), Text(" whole"), Finish()))
    running = asyncio.create_task(run(http_model))
    seen: list[dict[str, Any]] = []
    async for event in agx.listen(1, 1, "s", serialize=False):
        seen.append(event)
        if event["body"].get("content") == "half":
            assert not running.done()
            model_server.release()
    await running
    assert [e["body"]["content_delta"] for e in seen if e["body"].get("event") == "part_delta"] == [" whole"]


async def test_a_tool_call_with_split_arguments(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    model_server.script(call("add", '{"a"', ": 1, ", '"b": 2}'), say("three"))
    await run(http_model)
    entries, models, end = await check_recorded(configured)
    assert [e.body["args"] for e in entries if e.body.get("part_kind") == "tool-call"] == [{"a": 1, "b": 2}]
    assert [e.body["content"] for e in entries if e.body.get("part_kind") == "tool-return"] == [3]
    assert [model.finish_reason for model in models] == ["tool_call", "stop"]
    assert (end.model_calls, end.tool_calls) == (2, 1)
    assert model_server.requests[1].body["messages"][-1]["content"] == "3"


async def test_parallel_tools(configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    calls = (
        ToolCall("add", ('{"a": 1', ', "b": 1}'), "call_1"),
        ToolCall("add", ('{"a": 2', ', "b": 2}'), "call_2"),
        ToolCall("add", ('{"a": ', '"x"}'), "call_3"),
    )
    model_server.script((*calls, Finish("tool_calls")), say("done"))
    await run(http_model)
    entries, _, _ = await check_recorded(configured)
    starts = [e.body for e in entries if e.body.get("part_kind") == "tool-call"]
    assert [(body["tool_call_id"], body["args"]) for body in starts] == [
        ("call_1", {"a": 1, "b": 1}),
        ("call_2", {"a": 2, "b": 2}),
        ("call_3", {"a": "x"}),
    ]
    assert len({body["event_idx"] for body in starts}) == 3
    results = {e.body["tool_call_id"]: e.body for e in entries if e.body.get("part_kind") == "tool-return"}
    assert {name: body["tool_outcome"] for name, body in results.items()} == {
        "call_1": "ok",
        "call_2": "ok",
        "call_3": "retry",
    }
    assert (results["call_1"]["content"], results["call_2"]["content"]) == (2, 4)
    tools = of_kind(ToolEnded, await read_facts(configured))
    assert sorted((tool.call_id, tool.outcome) for tool in tools) == [
        ("call_1", "ok"),
        ("call_2", "ok"),
        ("call_3", "retry"),
    ]


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel, status: int
) -> None:
    model_server.script((Refusal(status),))
    with pytest.raises(ModelHTTPError) as caught:
        await run(http_model)
    assert caught.value.status_code == status
    entries, (model,), end = await check_recorded(configured)
    assert [e.name for e in entries] == ["begin", "llm-begin", "llm-end", "error", "end"]
    raised = type(caught.value)
    assert entries[-2].body["error_type"] == f"{raised.__module__}.{raised.__qualname__}"
    assert (end.outcome, end.error_type) == ("failed", entries[-2].body["error_type"])
    # A request that was refused is an observation all the same, with its duration and nothing used.
    assert (model.usage.source, model.usage.output, model.first_chunk_ns) == ("missing", 0, None)
    assert model.end_ns > model.start_ns
    assert not model.finish_reason_missing
    (node,) = (node for node in of_kind(NodeEnded, await read_facts(configured)) if node.model)
    assert (node.outcome, node.error_type) == ("failed", end.error_type)


async def test_a_disconnect_in_the_middle(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    model_server.script((Text("half an"), HardCut()))
    session = MemorySession(id="s")
    with pytest.raises(Exception, match=r"(?i)connection|read|peer") as caught:
        await agx.run(session, agent_with_tools(http_model), "hi", deps=ScopeDeps())
    assert not isinstance(caught.value, agx.AgxError)  # the model's own
    entries, (model,), end = await check_recorded(configured)
    assert text_of(entries) == "half an"
    assert [e.type for e in entries[-2:]] == ["error", "end"]
    assert end.outcome == "failed"
    assert (model.usage.source, model.finish_reason_missing) == ("estimated", False)
    assert b"half an" in session.store["s"]  # what was answered is kept


async def test_a_stream_closed_before_its_finish_reason(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    model_server.script((Text("half an"), CleanCut()))
    session = MemorySession(id="s")
    result = await agx.run(session, agent_with_tools(http_model), "hi", deps=ScopeDeps())
    assert result.output == "half an"
    entries, (model,), end = await check_recorded(configured)
    assert (end.outcome, entries[-1].body["outcome"]) == ("completed", "completed")
    assert model.finish_reason_missing is True


async def test_a_cancel_reaches_the_provider(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    model_server.script((Text("half an"), Silence()))
    running = asyncio.create_task(run(http_model))
    await wait_until(lambda: model_server.silent)
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError) as caught:
        await running
    assert "half an" in str(caught.value.messages[-1])
    await wait_until(lambda: model_server.disconnects, what="the connection to the provider is closed")
    _, (model,), end = await check_recorded(configured)
    assert (end.outcome, end.reason, end.stage) == ("cancelled", "cancel", "model_request")
    assert (model.usage.source, model.finish_reason_missing) == ("estimated", False)


async def test_a_provider_that_reports_no_usage(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    model_server.script(say("twelve chars", finish=Finish(input_tokens=None)))
    await run(http_model)
    _, (model,), _ = await check_recorded(configured)
    assert (model.usage.source, model.usage.output, model.finish_reason_missing) == ("estimated", 3, False)


async def test_without_an_sdk_the_provider_gets_our_trace(
    configured: Redis, model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    from opentelemetry.propagate import inject

    agent = agent_with_tools(http_model)
    sent: dict[str, str] = {}

    @agent.tool_plain
    def look() -> str:
        inject(sent)
        return "seen"

    model_server.script(call("look", "{}"), say("done"))
    await agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps())
    begin = (await read_stream(configured))[0].body
    (tool,) = of_kind(ToolEnded, await read_facts(configured))
    assert sent["traceparent"] == f"00-{tool.trace.trace_id}-{tool.trace.span_id}-01"
    assert begin["traceparent"].split("-")[1] == tool.trace.trace_id
