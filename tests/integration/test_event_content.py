"""What the events of a run contain: text, thinking, tool calls and their results, answers (contract, section 4)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ImageUrl, ModelRetry, ToolDefinition
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ThinkingPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.output import TextOutput
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, RunContext, ToolApproved, ToolDenied
from redis.asyncio import Redis
from support.agents import ScopeDeps, call, scripted, think
from support.recorded import Entry, check_seq, of_kind, read_facts, read_stream, text_of

import agx
from agx.error_codes import RUN_FAILED
from agx.facts.schema import NodeEnded, RunEnded, ToolEnded
from agx.testing import MemorySession


async def run_and_read(agent: Agent[ScopeDeps, Any], client: Redis, prompt: Any = "hi", **kwargs: Any) -> list[Entry]:
    """Run an agent and return its stream."""
    await agx.run(MemorySession(id="s"), agent, prompt, deps=ScopeDeps(), **kwargs)
    entries = await read_stream(client)
    check_seq(entries)
    return entries


def parts(entries: list[Entry], kind: str) -> list[dict[str, Any]]:
    return [e.body for e in entries if e.name == "part_start" and e.body["part_kind"] == kind]


async def tools(client: Redis) -> list[tuple[str, str]]:
    return [(tool.call_id, tool.outcome) for tool in of_kind(ToolEnded, await read_facts(client))]


async def test_text(configured: Redis) -> None:
    entries = await run_and_read(Agent(scripted(["one", " two", " three"])), configured)
    assert [e.name for e in entries if e.name != "part_delta"] == [
        "begin",
        "llm-begin",
        "part_start",
        "answer",
        "llm-end",
        "end",
    ]
    assert text_of(entries) == "one two three"
    (start,) = parts(entries, "text")
    assert start == {
        "idx": 0,
        "event": "part_start",
        "event_idx": 0,
        "part_kind": "text",
        "content": "one",
        "seq": start["seq"],
    }
    deltas = [e.body for e in entries if e.name == "part_delta"]
    assert deltas
    for body in deltas:
        assert {"idx": 0, "event_idx": 0, "part_kind": "text", "part_delta_kind": "text"}.items() <= body.items()


async def test_begin_and_end_say_which_run_and_how_it_ended(configured: Redis) -> None:
    first = await run_and_read(Agent(scripted(["a"]), name="first"), configured)
    begin, end = first[0].body, first[-1].body
    assert set(begin) >= {"session_id", "run_id", "traceparent", "agent", "follows", "seq"}
    assert (begin["session_id"], begin["agent"], begin["follows"], begin["seq"]) == ("s", "first", None, 0)
    assert (end["outcome"], end["reason"], end["run_id"]) == ("completed", None, begin["run_id"])
    version, trace_id, span_id, flags = begin["traceparent"].split("-")
    assert (version, len(trace_id), len(span_id), flags) == ("00", 32, 16, "01")
    second = await run_and_read(Agent(scripted(["b"])), configured)
    assert second[0].body["run_id"] != begin["run_id"]
    assert second[0].body["follows"] == begin["traceparent"]


async def test_thinking_comes_before_the_text_and_is_distinguished(configured: Redis) -> None:
    entries = await run_and_read(Agent(scripted([*think("let", " me", " see"), "done", "!"])), configured)
    assert (text_of(entries, "thinking"), text_of(entries)) == ("let me see", "done!")
    thinking = [e.body for e in entries if e.body.get("part_kind") == "thinking"]
    assert {body["event_idx"] for body in thinking} == {0}
    assert [b["part_delta_kind"] for b in thinking if b["event"] == "part_delta"] == ["thinking"] * (len(thinking) - 1)


def adder() -> Agent[ScopeDeps, str]:
    model = scripted(
        [*call("add", '{"a": 1', ', "b"', ": 2}")],
        ["three"],
    )
    agent: Agent[ScopeDeps, str] = Agent(model, deps_type=ScopeDeps)

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    return agent


async def test_a_tool_call_split_over_deltas_is_one_event_with_parsed_args(configured: Redis) -> None:
    entries = await run_and_read(adder(), configured)
    assert [e.name for e in entries if e.name != "part_delta"] == [
        *("begin", "llm-begin", "part_start", "llm-end"),
        *("part_start", "llm-begin", "part_start", "answer", "llm-end", "end"),
    ]
    (made,) = parts(entries, "tool-call")
    assert {
        "idx": 0,
        "event_idx": 0,
        "tool_name": "add",
        "tool_call_id": "c1",
        "args": {"a": 1, "b": 2},
    }.items() <= made.items()
    (result,) = parts(entries, "tool-return")
    # Under the idx of the request that called, though it comes behind its llm-end.
    assert {
        "idx": 0,
        "tool_name": "add",
        "tool_call_id": "c1",
        "content": 3,
        "tool_outcome": "ok",
    }.items() <= result.items()
    assert [e.body["idx"] for e in entries if e.name == "llm-begin"] == [0, 1]
    assert await tools(configured) == [("c1", "ok")]


async def test_parallel_tools_are_reported_as_each_returns(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("slow"), *call("fast", call_id="c2", index=1)], ["both"]), deps_type=ScopeDeps
    )
    fast_is_streamed = asyncio.Event()

    @agent.tool_plain
    async def slow() -> str:
        await fast_is_streamed.wait()
        return "slow"

    @agent.tool_plain
    async def fast() -> str:
        return "fast"

    running = asyncio.create_task(agx.run(MemorySession(id="s"), agent, "go", deps=ScopeDeps()))
    async for event in agx.listen(1, 1, "s", serialize=False):
        if event["body"].get("content") == "fast":
            fast_is_streamed.set()  # so the result is in the stream while the other tool still runs
    await running
    results = parts(await read_stream(configured), "tool-return")
    assert [body["tool_call_id"] for body in results] == ["c2", "c1"]


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ('{"a": 1', {"raw": '{"a": 1'}),
        ("[1, 2]", {"raw": "[1, 2]"}),
        ('"x"', {"raw": '"x"'}),
        ("", {}),
        ('{"a": NaN}', {"raw": '{"a": NaN}'}),
        ('{"a": "\\ud800"}', None),
    ],
    ids=["cut", "list", "string", "empty", "nan", "surrogate"],
)
async def test_args_that_are_no_object_stay_raw(configured: Redis, text: str, args: dict[str, Any] | None) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("look", text)], ["well"]), deps_type=ScopeDeps, retries=3)

    @agent.tool_plain(retries=3)
    def look(a: str = "") -> str:
        return "seen"

    entries = await run_and_read(agent, configured)
    (made,) = parts(entries, "tool-call")
    if args is not None:
        assert made["args"] == args
    assert isinstance(made["args"], dict)
    (result,) = parts(entries, "tool-return")
    assert result["tool_outcome"] in ("ok", "retry")
    assert [outcome for _, outcome in await tools(configured)] == [result["tool_outcome"]]


async def test_a_retried_tool_is_reported_with_what_it_asked_for(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("guess", '{"n": 1}')], [*call("guess", '{"n": 2}', call_id="c2")], ["two"]), deps_type=ScopeDeps
    )

    @agent.tool_plain(retries=2)
    def guess(n: int) -> str:
        if n != 2:
            raise ModelRetry("higher")
        return "right"

    results = parts(await run_and_read(agent, configured), "tool-return")
    assert [(r["idx"], r["tool_call_id"], r["tool_outcome"]) for r in results] == [(0, "c1", "retry"), (1, "c2", "ok")]
    assert "higher" in str(results[0]["content"])
    assert await tools(configured) == [("c1", "retry"), ("c2", "ok")]


async def test_wrong_arguments_and_unknown_tools_are_reported_as_retries(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("guess", '{"n": "x"}')], [*call("nobody", "{}", call_id="c2")], ["gave up"]),
        deps_type=ScopeDeps,
    )

    @agent.tool_plain(retries=2)
    def guess(n: int) -> str:
        return "right"

    results = parts(await run_and_read(agent, configured), "tool-return")
    assert [(r["tool_name"], r["tool_outcome"]) for r in results] == [("guess", "retry"), ("nobody", "retry")]
    assert await tools(configured) == [("c1", "retry"), ("c2", "retry")]


async def test_a_tool_that_raises_is_an_error_and_fails_the_run(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("burst")]), deps_type=ScopeDeps)

    @agent.tool_plain
    def burst() -> str:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        await agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps())
    entries = await read_stream(configured)
    check_seq(entries)
    assert [e.type for e in entries[-2:]] == ["error", "end"]
    seen = {"msg": RUN_FAILED.sentence, "error_type": "ZeroDivisionError", "code": "run_failed"}
    assert entries[-2].body == {**seen, "seq": len(entries) - 2}
    assert entries[-1].body["outcome"] == "failed"
    facts = await read_facts(configured)
    (tool,) = of_kind(ToolEnded, facts)
    assert (tool.outcome, tool.error_type, tool.error_message) == ("error", "ZeroDivisionError", None)
    (end,) = of_kind(RunEnded, facts)
    assert (end.outcome, end.error_type, end.error_message) == ("failed", "ZeroDivisionError", None)


def cautious(*replies: Any) -> Agent[ScopeDeps, str | DeferredToolRequests]:
    agent: Agent[ScopeDeps, str | DeferredToolRequests] = Agent(
        scripted(*replies), deps_type=ScopeDeps, output_type=[str, DeferredToolRequests]
    )

    @agent.tool_plain(requires_approval=True)
    def delete(path: str) -> str:
        return f"{path} deleted"

    return agent


async def test_a_call_that_needs_approval_is_deferred_then_told_when_it_ran(configured: Redis) -> None:
    agent = cautious([*call("delete", '{"path": "/a"}')], ["gone"])
    session = MemorySession(id="s")
    result = await agx.run(session, agent, "delete a", deps=ScopeDeps())
    assert isinstance(result.output, DeferredToolRequests)
    entries = await read_stream(configured)
    check_seq(entries)
    assert [body["tool_name"] for body in parts(entries, "tool-call")] == ["delete"]
    assert [e.name for e in entries].count("answer") == 1
    assert entries[-1].body["outcome"] == "completed"
    assert await tools(configured) == [("c1", "deferred")]

    approved = DeferredToolResults(approvals={"c1": ToolApproved()})
    await agx.run(
        MemorySession(id="s", store=session.store), agent, None, deps=ScopeDeps(), deferred_tool_results=approved
    )
    entries = await read_stream(configured)
    check_seq(entries)
    (returned,) = parts(entries, "tool-return")
    assert (returned["idx"], returned["content"], returned["tool_outcome"]) == (0, "/a deleted", "ok")
    assert await tools(configured) == [("c1", "deferred"), ("c1", "ok")]


async def test_a_denied_call_is_reported_as_denied(configured: Redis) -> None:
    agent = cautious([*call("delete", '{"path": "/a"}')], ["kept"])
    session = MemorySession(id="s")
    await agx.run(session, agent, "delete a", deps=ScopeDeps())
    denied = DeferredToolResults(approvals={"c1": ToolDenied("never")})
    entries = await run_and_read(agent, configured, None, message_history=session.msgs, deferred_tool_results=denied)
    (returned,) = parts(entries, "tool-return")
    assert (returned["content"], returned["tool_outcome"]) == ("never", "denied")
    assert await tools(configured) == [("c1", "deferred"), ("c1", "denied")]


class City(BaseModel):
    name: str
    country: str


async def test_structured_output_is_an_answer_by_its_tool_call(configured: Redis) -> None:
    fragments = ('{"name": "Lyon",', ' "country": "France"}')
    agent: Agent[ScopeDeps, City] = Agent(
        scripted([*call("final_result", *fragments)]), deps_type=ScopeDeps, output_type=City
    )
    entries = await run_and_read(agent, configured)
    (answer,) = (e.body for e in entries if e.name == "answer")
    assert (answer["idx"], answer["tool_name"], answer["tool_call_id"]) == (0, "final_result", "c1")
    (made,) = parts(entries, "tool-call")
    assert made["args"] == {"name": "Lyon", "country": "France"}
    assert await tools(configured) == []  # an output tool is no tool that was run


async def test_an_answer_comes_again_after_an_output_retry(configured: Redis) -> None:
    agent: Agent[ScopeDeps, City] = Agent(
        scripted(
            [*call("final_result", '{"name": "Lyon"}')],
            [*call("final_result", '{"name": "Lyon", "country": "France"}', call_id="c2")],
        ),
        deps_type=ScopeDeps,
        output_type=City,
        retries=2,
    )
    entries = await run_and_read(agent, configured)
    assert [(e.body["idx"], e.body["tool_call_id"]) for e in entries if e.name == "answer"] == [(0, "c1"), (1, "c2")]


async def test_an_output_function_that_asks_again_gives_two_answers(configured: Redis) -> None:
    def shout(text: str) -> str:
        if text.islower():
            raise ModelRetry("louder")
        return text

    agent: Agent[ScopeDeps, str] = Agent(
        scripted(["quiet"], ["LOUD"]), deps_type=ScopeDeps, output_type=TextOutput(shout), retries=2
    )
    entries = await run_and_read(agent, configured)
    assert [e.body["idx"] for e in entries if e.name == "answer"] == [0, 1]


async def test_output_retries_that_run_out_fail_the_run(configured: Redis) -> None:
    agent: Agent[ScopeDeps, City] = Agent(
        scripted(*([*call("final_result", "{}")] for _ in range(3))), deps_type=ScopeDeps, output_type=City, retries=1
    )
    with pytest.raises(UnexpectedModelBehavior):
        await agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps())
    assert [e.type for e in (await read_stream(configured))[-2:]] == ["error", "end"]


@pytest.mark.parametrize(
    "prompt",
    [
        ["look", ImageUrl(url="https://example.com/a.png")],
        ["look", BinaryContent(data=b"\x89PNG\x00\xff", media_type="image/png")],
        [BinaryContent(data=b"\x00" * 100_000, media_type="application/octet-stream")],
        "lone \ud800 surrogate",
        "",
    ],
    ids=["url", "image", "binary", "surrogate", "empty"],
)
async def test_multimodal_and_odd_prompts(configured: Redis, prompt: Any) -> None:
    entries = await run_and_read(Agent(scripted(["seen"])), configured, prompt)
    assert text_of(entries) == "seen"
    assert entries[-1].body["outcome"] == "completed"


async def test_a_model_that_does_not_stream_gives_whole_events(configured: Redis) -> None:
    replies = iter(
        [
            ModelResponse(parts=[ThinkingPart("hm"), ToolCallPart("add", {"a": 1, "b": 2}, "c1")]),
            ModelResponse(parts=[TextPart("three")]),
        ]
    )

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return next(replies)

    agent: Agent[ScopeDeps, str] = Agent(FunctionModel(answer), deps_type=ScopeDeps)

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    entries = await run_and_read(agent, configured)
    assert [e.name for e in entries] == [
        *("begin", "llm-begin", "part_start", "part_start", "llm-end"),
        *("part_start", "llm-begin", "part_start", "llm-end", "answer", "end"),
    ]
    assert parts(entries, "thinking")[0]["content"] == "hm"
    assert parts(entries, "tool-call")[0]["args"] == {"a": 1, "b": 2}
    assert parts(entries, "tool-return")[0]["content"] == 3
    assert text_of(entries) == "three"
    assert await tools(configured) == [("c1", "ok")]
    models = [node.model for node in of_kind(NodeEnded, await read_facts(configured)) if node.model]
    assert [model.stream for model in models] == [False, False]


async def test_a_tool_hidden_by_a_hook_and_one_prepared_away_change_nothing(configured: Redis) -> None:
    async def hide(ctx: RunContext[ScopeDeps], definition: ToolDefinition) -> ToolDefinition | None:
        return None

    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("hidden")], ["fine"]), deps_type=ScopeDeps)

    @agent.tool_plain(prepare=hide)
    def hidden() -> str:
        return "never"

    (returned,) = parts(await run_and_read(agent, configured), "tool-return")
    assert returned["tool_outcome"] == "retry"
