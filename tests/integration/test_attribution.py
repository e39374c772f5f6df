"""Numbers and names of model requests and tool calls in the facts are right (issue 12)."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pydantic_ai.capabilities
import pydantic_ai.exceptions
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, CallDeferred, DeferredToolRequests, DeferredToolResults
from pydantic_ai.capabilities import AbstractCapability, HandleDeferredToolCalls
from pydantic_ai.exceptions import FallbackExceptionGroup, ModelHTTPError
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.usage import RequestUsage
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.observing import Probe, ScriptedModel
from support.recorded import read_recorded

import agx
from agx.facts.schema import ModelCall, NodeEnded, RunEnded, ToolEnded
from agx.model_calls.usage import read_usage

DOWN = [ModelHTTPError(503, "first", "down")]
BUSY = [ModelHTTPError(529, "first", "busy")]
HTTP_ERROR = "pydantic_ai.exceptions.ModelHTTPError"


async def run_and_read(redis: Redis, agent: Agent[Any, Any], **kwargs: Any) -> tuple[list[NodeEnded], list[ToolEnded]]:
    await agent.run("hi", capabilities=[agx.AgxCapability(1, 1, "s")], **kwargs)
    recorded = await read_recorded(redis)
    return recorded.of(NodeEnded), recorded.of(ToolEnded)


def names(calls: list[ModelCall]) -> list[tuple[str, str, str | None]]:
    return [(call.provider, call.request_model, call.error_type) for call in calls]


def requests_of(nodes: list[NodeEnded]) -> list[ModelCall]:
    """Return the requests in the order in which they were sent."""
    return [call for node in nodes if node.model for call in (*node.failed_attempts, node.model)]


async def test_a_fallback_model_is_attributed_to_the_model_that_answered(configured: Redis) -> None:
    p = Probe()
    inner = FallbackModel(ScriptedModel(p, DOWN, name="b"), ScriptedModel(p, ["yes"], name="c"))
    agent = Agent(FallbackModel(ScriptedModel(p, DOWN, name="a"), inner), name="falls back")
    nodes, _ = await run_and_read(configured, agent)
    calls = requests_of(nodes)
    assert names(calls) == [
        ("provider-of-a", "a", HTTP_ERROR),
        ("provider-of-b", "b", HTTP_ERROR),
        ("provider-of-c", "c", None),
    ]
    assert [call.usage.source for call in calls] == ["missing", "missing", "reported"]
    assert all(call.start_ns <= call.end_ns for call in calls)
    assert [before.end_ns <= after.start_ns for before, after in itertools.pairwise(calls)] == [True, True]
    (end,) = (await read_recorded(configured)).of(RunEnded)
    assert end.model_calls == 3


async def test_all_models_of_a_fallback_fail(configured: Redis) -> None:
    p = Probe()
    agent = Agent(FallbackModel(ScriptedModel(p, DOWN, name="a"), ScriptedModel(p, DOWN, name="b")))
    with pytest.raises(FallbackExceptionGroup):
        await run_and_read(configured, agent)
    (node,) = [node for node in (await read_recorded(configured)).of(NodeEnded) if node.model]
    assert names(requests_of([node])) == [("provider-of-a", "a", HTTP_ERROR), ("provider-of-b", "b", HTTP_ERROR)]
    assert node.outcome == "failed"


async def test_a_fallback_model_cancelled_in_its_second_model(configured: Redis) -> None:
    gone = asyncio.Event()

    class Silent(ScriptedModel):
        async def request(self, *args: Any) -> Any:
            gone.set()
            await asyncio.Event().wait()

    p = Probe()
    agent = Agent(FallbackModel(ScriptedModel(p, DOWN, name="a"), Silent(p, [""], name="b")))
    running = asyncio.create_task(run_and_read(configured, agent))
    await gone.wait()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(pydantic_ai.exceptions.RunCancelled):
        await running
    (node,) = [node for node in (await read_recorded(configured)).of(NodeEnded) if node.model]
    assert node.model is not None
    assert not node.model.request_model.startswith("fallback:")
    assert (node.model.usage.source, node.model.usage.input) == ("estimated", 1)


if hasattr(pydantic_ai.exceptions, "RetryModelRequest"):

    class Retries(AbstractCapability[Any]):
        async def on_model_request_error(self, ctx: Any, *, request_context: Any, error: Any) -> Any:
            raise pydantic_ai.exceptions.RetryModelRequest from error

    async def test_two_529_then_200_are_three_observations(configured: Redis) -> None:
        agent = Agent(ScriptedModel(Probe(), BUSY, BUSY, ["yes"]), capabilities=[Retries()])
        nodes, _ = await run_and_read(configured, agent)
        first = ("provider-of-first", "first")
        assert names(requests_of(nodes)) == [(*first, HTTP_ERROR), (*first, HTTP_ERROR), (*first, None)]


if hasattr(pydantic_ai.capabilities, "ModelFallback"):
    from pydantic_ai.capabilities import ModelFallback

    async def test_model_fallback_is_attributed_to_the_model_that_answered(configured: Redis) -> None:
        p = Probe()
        first = ScriptedModel(p, ["no"], finish="content_filter")
        agent = Agent(first, capabilities=[ModelFallback(ScriptedModel(p, ["yes"], name="second"))])
        nodes, _ = await run_and_read(configured, agent)
        refused, answered = requests_of(nodes)
        assert names([refused, answered]) == [
            ("provider-of-first", "first", "rejected"),
            ("provider-of-second", "second", None),
        ]
        assert (refused.usage.source, refused.usage.output) == ("reported", 5)  # it was billed


@pytest.mark.parametrize(
    "used",
    [
        RequestUsage(output_tokens=100, output_reasoning_tokens=80, details={"thoughts_tokens": 80}),
        RequestUsage(output_tokens=100, output_reasoning_tokens=80),
        *(
            RequestUsage(output_tokens=100, details={name: 80})
            for name in ("reasoning_tokens", "thoughts_tokens", "thinking_tokens")
        ),
    ],
)
def test_reasoning_tokens_under_each_name(used: RequestUsage) -> None:
    usage = read_usage(used)
    assert (usage.output, usage.reasoning) == (100, 80)


def test_one_hour_cache_writes_and_the_cost_of_the_response() -> None:
    usage = read_usage(
        RequestUsage(
            input_tokens=100_000, cache_write_tokens=100_000, cache_write_1h_tokens=100_000, cost=Decimal("0.60015")
        )
    )
    assert (usage.cache_write, usage.cache_write_1h, usage.cost_nano_usd) == (100_000, 100_000, 600_150_000)


def test_odd_numbers_of_tokens_are_taken() -> None:
    odd: Any = {"input_tokens": 2**70, "output_tokens": 5.5, "cache_read_tokens": "7", "cost": float("nan")}
    used = RequestUsage()
    for name, value in (odd | {"details": {"reasoning_tokens": None}}).items():
        setattr(used, name, value)
    usage = read_usage(used)
    assert (usage.input, usage.output, usage.cache_read, usage.reasoning) == (2**63 - 1, 5, 7, 0)
    assert usage.cost_nano_usd is None


class City(BaseModel):
    name: str


FINAL = ToolCallPart("final_result", {"name": "Bonn"}, tool_call_id="f1")


async def test_a_tool_skipped_by_the_final_result_does_not_count(configured: Redis) -> None:
    model = ScriptedModel(Probe(), [FINAL, ToolCallPart("t", {}, tool_call_id="c1")])
    agent: Agent[None, City] = Agent(model, output_type=City, end_strategy="early")

    @agent.tool_plain
    def t() -> str:
        raise AssertionError("it must not run")

    _, tools = await run_and_read(configured, agent)
    assert tools == []
    (end,) = (await read_recorded(configured)).of(RunEnded)
    assert end.tool_calls == 0


async def test_tools_that_the_agent_does_not_have_are_marked(configured: Redis) -> None:
    calls = [ToolCallPart(name, {}, tool_call_id=name) for name in ("t", "invented")]
    agent = Agent(ScriptedModel(Probe(), calls, ["done"]))

    @agent.tool_plain
    def t() -> str:
        return "done"

    _, tools = await run_and_read(configured, agent)
    assert sorted((tool.tool, tool.known, tool.outcome) for tool in tools) == [
        ("invented", False, "retry"),
        ("t", True, "ok"),
    ]


def deferring(*capabilities: AbstractCapability[Any]) -> Agent[None, Any]:
    model = ScriptedModel(Probe(), [ToolCallPart("later", {}, tool_call_id="d1")], ["done"])
    agent: Agent[None, Any] = Agent(model, output_type=[str, DeferredToolRequests], capabilities=capabilities)

    @agent.tool_plain
    def later() -> str:
        raise CallDeferred

    return agent


async def test_a_deferred_call_counts_once_across_two_runs(configured: Redis) -> None:
    agent = deferring()
    result = await agent.run("hi", capabilities=[agx.AgxCapability(1, 1, "s")])
    assert isinstance(result.output, DeferredToolRequests)
    results = DeferredToolResults(calls={"d1": "here"})
    resolved = await agent.run(
        message_history=result.all_messages(),
        deferred_tool_results=results,
        capabilities=[agx.AgxCapability(1, 1, "s")],
    )
    assert resolved.output == "done"
    tools = (await read_recorded(configured)).of(ToolEnded)
    assert [(tool.tool, tool.outcome) for tool in tools] == [("later", "deferred")]


async def test_a_deferred_call_resolved_within_its_run_counts_once(configured: Redis) -> None:
    async def resolve(ctx: Any, requests: DeferredToolRequests) -> DeferredToolResults:
        return requests.build_results(calls={call.tool_call_id: "here" for call in requests.calls})

    _, tools = await run_and_read(configured, deferring(HandleDeferredToolCalls(resolve)))
    assert [(tool.tool, tool.outcome) for tool in tools] == [("later", "ok")]


@pytest.mark.filterwarnings("ignore:Failed to get cost")  # pydantic-ai's own, of such a name
async def test_a_numeric_call_id_and_numeric_names_are_taken(configured: Redis) -> None:
    odd: Any = 7

    class Odd(ScriptedModel):
        async def request(self, *args: Any) -> ModelResponse:
            return replace(await super().request(*args), model_name=odd, provider_response_id=odd)

    agent = Agent(Odd(Probe(), [ToolCallPart("t", {}, tool_call_id=odd)], ["done"]))

    @agent.tool_plain
    def t() -> str:
        return "done"

    nodes, (tool,) = await run_and_read(configured, agent)
    assert (tool.call_id, tool.outcome) == ("7", "ok")
    assert {(call.response_model, call.response_id) for call in requests_of(nodes)} == {("7", "7")}


async def test_a_cancelled_request_has_estimated_input_tokens(configured: Redis) -> None:
    silent = asyncio.Event()

    class Stops(ScriptedModel):
        async def request(self, *args: Any) -> ModelResponse:
            if len(args[0]) > 1:
                silent.set()
                await asyncio.Event().wait()
            return await super().request(*args)

    model = Stops(Probe(), [ToolCallPart("t", {}, tool_call_id="c1")])
    agent: Agent[ScopeDeps, str] = Agent(model, deps_type=ScopeDeps, instructions="x" * 40)

    @agent.tool_plain
    def t() -> str:
        return "y" * 400

    running = asyncio.create_task(agx.run(FakeSession(), agent, "z" * 80, deps=ScopeDeps()))
    await silent.wait()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    last = requests_of((await read_recorded(configured)).of(NodeEnded))[-1]
    assert (last.usage.source, last.usage.output) == ("estimated", 0)
    assert last.usage.input == 131  # (40 + 80 + 400) / 4, and the arguments of the call


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "fails"])
async def test_a_sub_agent_run_plainly_is_counted(
    configured: Redis, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    researcher = Agent(ScriptedModel(Probe(), [ToolCallPart("look", {}, tool_call_id="c1")], ["found"], name="inner"))
    name = f"outer that {fails}"
    agent = Agent(ScriptedModel(Probe(), [ToolCallPart("ask", {}, tool_call_id="c1")], ["done"]), name=name)

    @researcher.tool_plain
    def look() -> str:
        if fails:
            raise LookupError("nothing there")
        return "it"

    @agent.tool_plain
    async def ask() -> str:
        earlier = await ScriptedModel(Probe(), ["earlier"]).request([], None, ModelRequestParameters())
        try:
            return (await researcher.run("hi", message_history=[ModelRequest([]), earlier])).output
        except LookupError:
            return "nothing"

    nodes, (tool,) = await run_and_read(configured, agent)
    calls = [node for node in nodes if node.model and node.model.provider == "provider-of-inner"]
    assert len(calls) == (1 if fails else 2)  # not the one in its history
    assert [(node.agent, node.idx, node.trace.parent_span_id) for node in calls] == [
        (name, 0, tool.trace.span_id) for _ in calls
    ]
    assert len({node.id for node in nodes}) == len(nodes)
    assert all(node.model and (node.model.usage.input, node.model.usage.output) == (7, 5) for node in calls)
    assert all(tool.start_ns <= node.start_ns <= node.end_ns <= tool.end_ns for node in calls)
    (end,) = (await read_recorded(configured)).of(RunEnded)
    assert (end.plain_runs, end.model_calls) == (1, 2 + len(calls))
    assert [record.message.count(f"'ask' of agent {name!r}") for record in caplog.records] == [1]


async def test_a_sub_agent_with_the_capability_counts_once(configured: Redis) -> None:
    inner = Agent(ScriptedModel(Probe(), ["found"], name="inner"), name="inner", capabilities=[agx.AgxCapability()])
    agent = Agent(ScriptedModel(Probe(), [ToolCallPart("ask", {}, tool_call_id="c1")], ["done"]), name="outer")

    @agent.tool_plain
    async def ask() -> str:
        return (await inner.run("hi")).output

    nodes, _ = await run_and_read(configured, agent)
    assert sorted((node.agent, node.model.request_model) for node in nodes if node.model) == [
        ("inner", "inner"),
        ("outer", "first"),
        ("outer", "first"),
    ]
    ends = {end.agent: end for end in (await read_recorded(configured)).of(RunEnded)}
    assert (ends["outer"].plain_runs, ends["outer"].model_calls, ends["inner"].model_calls) == (0, 2, 1)
