"""Observing changes nothing: each agent ends in the same way without agx, observed, and streamed (issue 12).

Every wrapper of models, capability with a part in model requests, output mode and entry point of the installed
pydantic-ai. It runs on the oldest and the newest version that agx allows, so a class that only the newer one has makes
a case only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pydantic_ai.capabilities
import pydantic_ai.exceptions
import pytest
from pydantic import BaseModel
from pydantic_ai import (
    Agent,
    CallDeferred,
    DeferredToolRequests,
    ModelRetry,
    NativeOutput,
    PromptedOutput,
    RunContext,
    TextOutput,
    ToolOutput,
)
from pydantic_ai.capabilities import (
    AbstractCapability,
    Hooks,
    Instrumentation,
    ProcessEventStream,
    ProcessHistory,
    ReinjectSystemPrompt,
    SelectModel,
)
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models import Model
from pydantic_ai.models.concurrency import ConcurrencyLimitedModel
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.instrumented import InstrumentationSettings, InstrumentedModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.result import FinalResult
from pydantic_ai.tools import RunContext as ToolContext
from pydantic_graph import End
from redis.asyncio import Redis
from support.observing import ENTRY_POINTS, Made, Make, Outcome, Probe, ScriptedModel, outcome_of
from support.recorded import read_stream

import agx

Caps = list[AbstractCapability[Any]]

ANSWER = ["an ", "answer"]
CALL = [ToolCallPart("work", {"n": 1}, tool_call_id="c1")]
ODD: Any = 5
CUT = ["half an ", ModelHTTPError(503, "first", "cut")]
DOWN = [ModelHTTPError(503, "first", "down")]


class City(BaseModel):
    name: str


CITY = ToolCallPart("final_result", {"name": "Bonn"}, tool_call_id="f1")
JSON = ['{"name":', '"Bonn"}']


def agent_of(model: Model | None, *capabilities: AbstractCapability[Any], **kwargs: Any) -> Made:
    agent: Made = Agent(model, name="made", capabilities=capabilities, **kwargs)

    @agent.tool
    def work(ctx: RunContext[None], n: int) -> str:
        if ctx.retry == 0 and n == 2:
            raise ModelRetry("once more")
        return f"worked {n}"

    return agent


class Unstreamed(ScriptedModel):
    """A model without `request_stream`."""

    request_stream = Model.request_stream


class Careful(WrapperModel):
    """A user's wrapper that repairs complete responses."""

    async def request(self, *args: Any) -> ModelResponse:
        await self.wrapped.request(*args)
        return ModelResponse([TextPart("repaired")], model_name=self.model_name)


class Doubled(WrapperModel):
    """A user's wrapper that asks again after an error, where it can."""

    async def request(self, *args: Any) -> ModelResponse:
        try:
            return await self.wrapped.request(*args)
        except ModelAPIError:
            return await self.wrapped.request(*args)

    @asynccontextmanager
    async def request_stream(self, *args: Any) -> Any:
        async with self.wrapped.request_stream(*args) as streamed:
            yield streamed


def refused(response: ModelResponse) -> bool:
    return "half" in str(response.parts)


def function_model(*, with_stream: bool) -> FunctionModel:
    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse([TextPart("by the function")])

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> Any:
        yield "by the other function"

    return FunctionModel(answer, stream_function=stream) if with_stream else FunctionModel(answer)


def pair(p: Probe, first: list[Any], **kwargs: Any) -> FallbackModel:
    return FallbackModel(ScriptedModel(p, first), ScriptedModel(p, ANSWER, name="second"), **kwargs)


MODELS: dict[str, Callable[[Probe], Model]] = {
    "plain": lambda p: ScriptedModel(p, CALL, ANSWER),
    "plain, down": lambda p: ScriptedModel(p, DOWN),
    "plain, cut": lambda p: ScriptedModel(p, CUT),
    "plain, refuses": lambda p: ScriptedModel(p, [""], finish="content_filter"),
    "plain, unknown tool": lambda p: ScriptedModel(p, [ToolCallPart("none", {}, tool_call_id="c0")], ANSWER),
    "plain, tool retries": lambda p: ScriptedModel(p, [ToolCallPart("work", {"n": 2}, tool_call_id="c0")], ANSWER),
    "plain, a number as arguments": lambda p: ScriptedModel(p, [ToolCallPart("work", ODD, tool_call_id="c0")], ANSWER),
    "WrapperModel": lambda p: WrapperModel(ScriptedModel(p, CALL, ANSWER)),
    "InstrumentedModel": lambda p: InstrumentedModel(ScriptedModel(p, CALL, ANSWER)),
    "ConcurrencyLimitedModel": lambda p: ConcurrencyLimitedModel(ScriptedModel(p, CALL, ANSWER), limiter=1),
    "a user's wrapper": lambda p: Careful(ScriptedModel(p, CALL, ANSWER)),
    "a user's retries": lambda p: Doubled(ScriptedModel(p, CUT, ANSWER)),
    "without a stream": lambda p: Unstreamed(p, CALL, ANSWER),
    "FallbackModel": lambda p: pair(p, DOWN),
    "FallbackModel, cut": lambda p: pair(p, CUT),
    "FallbackModel, judges": lambda p: pair(p, ["half ", "an answer"], fallback_on=refused),
    "FallbackModel, all down": lambda p: FallbackModel(ScriptedModel(p, DOWN), ScriptedModel(p, DOWN, name="second")),
    "FallbackModel, wrapped": lambda p: WrapperModel(pair(p, CUT)),
    "FallbackModel, one without a stream": lambda p: FallbackModel(
        ScriptedModel(p, DOWN), Unstreamed(p, ANSWER, name="second")
    ),
    "FunctionModel": lambda p: function_model(with_stream=False),
    "FunctionModel, two": lambda p: function_model(with_stream=True),
    "TestModel": lambda p: TestModel(),
}


class Watching(AbstractCapability[Any]):
    """A user's capability with every hook of a model request."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def before_model_request(self, ctx: Any, request_context: Any) -> Any:
        self.probe.hooks.append(("before", request_context.streaming))
        return request_context

    async def wrap_model_request(self, ctx: Any, *, request_context: Any, handler: Any) -> Any:
        self.probe.hooks.append(("wrap", request_context.streaming))
        return await handler(request_context)

    async def after_model_request(self, ctx: Any, *, request_context: Any, response: Any) -> Any:
        self.probe.hooks.append(("after", request_context.streaming))
        return response

    async def before_node_run(self, ctx: Any, *, node: Any) -> Any:
        self.probe.hooks.append(("node", type(node).__name__))
        return node

    async def wrap_tool_execute(self, ctx: Any, *, call: Any, tool_def: Any, args: Any, handler: Any) -> Any:
        self.probe.hooks.append(("tool", call.tool_name))
        return await handler(args)


class Recovers(AbstractCapability[Any]):
    """Answers itself when a request fails."""

    async def on_model_request_error(self, ctx: Any, *, request_context: Any, error: Any) -> ModelResponse:
        return ModelResponse([TextPart("recovered")], model_name="recovered")


ENDED = End(FinalResult("ended"))


class EndsAfterError(AbstractCapability[Any]):
    """Ends the run with an answer of its own when a node fails."""

    async def on_node_run_error(self, ctx: Any, *, node: Any, error: Exception) -> Any:
        return ENDED


class EndsWithin(AbstractCapability[Any]):
    """The same, around the node."""

    async def wrap_node_run(self, ctx: Any, *, node: Any, handler: Any) -> Any:
        try:
            return await handler(node)
        except ModelAPIError:
            return ENDED


class Replaces(AbstractCapability[Any]):
    """Sends each request to another model."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def before_model_request(self, ctx: Any, request_context: Any) -> Any:
        request_context.model = pair(self.probe, CUT)
        return request_context


class Wraps(AbstractCapability[Any]):
    """Wraps the model of each request."""

    def get_wrapper_model(self, model: Model) -> Model:
        return Careful(model)


def hooks_of(p: Probe) -> Hooks[Any]:
    async def before(ctx: Any, request_context: Any) -> Any:
        p.hooks.append(("before", request_context.streaming))
        return request_context

    return Hooks(before_model_request=before)


def tool_hooks_of(p: Probe) -> Hooks[Any]:
    async def before(ctx: ToolContext[Any], *, call: Any, tool_def: Any, args: Any) -> Any:
        p.hooks.append(("tool", call.tool_name))
        return args

    return Hooks(before_tool_execute=before)


def selector_of(p: Probe, *models: Model) -> SelectModel[Any]:
    def select(ctx: Any) -> Model:
        p.hooks.append(("select", len(ctx.messages)))
        return models[min(len([m for m in ctx.messages if isinstance(m, ModelResponse)]), len(models) - 1)]

    return SelectModel(select)


async def drain(ctx: Any, events: Any) -> None:
    async for _ in events:
        pass


def plain(p: Probe) -> ScriptedModel:
    return ScriptedModel(p, CALL, ANSWER)


CAPABILITIES: dict[str, Callable[[Probe, Caps], Made]] = {
    "all hooks": lambda p, c: agent_of(plain(p), Watching(p), *c),
    "all hooks, cut": lambda p, c: agent_of(ScriptedModel(p, CUT), Watching(p), *c),
    "Hooks": lambda p, c: agent_of(plain(p), hooks_of(p), *c),
    "Hooks of tools": lambda p, c: agent_of(plain(p), tool_hooks_of(p), *c),
    "recovers": lambda p, c: agent_of(ScriptedModel(p, CUT), Recovers(), *c),
    "ends after an error": lambda p, c: agent_of(ScriptedModel(p, CUT), EndsAfterError(), *c),
    "ends after an error, within": lambda p, c: agent_of(ScriptedModel(p, CUT), EndsWithin(), *c),
    "replaces the model": lambda p, c: agent_of(plain(p), Replaces(p), *c),
    "wraps the model": lambda p, c: agent_of(plain(p), Wraps(), *c),
    "ProcessHistory": lambda p, c: agent_of(plain(p), ProcessHistory(lambda m: m[-1:]), *c),
    "ReinjectSystemPrompt": lambda p, c: agent_of(plain(p), ReinjectSystemPrompt(), *c, system_prompt="Be brief."),
    "Instrumentation": lambda p, c: agent_of(plain(p), Instrumentation(InstrumentationSettings()), *c),
    "ProcessEventStream": lambda p, c: agent_of(plain(p), ProcessEventStream(drain), *c),
    "SelectModel": lambda p, c: agent_of(
        None, selector_of(p, ScriptedModel(p, CALL), ScriptedModel(p, ANSWER, name="second")), *c
    ),
    "SelectModel, then a fallback": lambda p, c: agent_of(
        plain(p), selector_of(p, ScriptedModel(p, CALL), pair(p, CUT)), *c
    ),
}

if hasattr(pydantic_ai.exceptions, "RetryModelRequest"):

    class RetriesWhenDown(AbstractCapability[Any]):
        async def on_model_request_error(self, ctx: Any, *, request_context: Any, error: Any) -> Any:
            raise pydantic_ai.exceptions.RetryModelRequest from error

    class RetriesWhenRefused(AbstractCapability[Any]):
        async def after_model_request(self, ctx: Any, *, request_context: Any, response: Any) -> Any:
            if refused(response):
                raise pydantic_ai.exceptions.RetryModelRequest
            return response

    CAPABILITIES |= {
        "RetryModelRequest": lambda p, c: agent_of(ScriptedModel(p, DOWN, DOWN, ANSWER), RetriesWhenDown(), *c),
        "RetryModelRequest, cut": lambda p, c: agent_of(ScriptedModel(p, CUT, ANSWER), RetriesWhenDown(), *c),
        "RetryModelRequest, refused": lambda p, c: agent_of(
            ScriptedModel(p, ["half"], ANSWER), RetriesWhenRefused(), *c
        ),
    }

if hasattr(pydantic_ai.capabilities, "ModelFallback"):
    from pydantic_ai.capabilities import ModelFallback

    def second(p: Probe) -> ScriptedModel:
        return ScriptedModel(p, ANSWER, name="second")

    CAPABILITIES |= {
        "ModelFallback": lambda p, c: agent_of(ScriptedModel(p, DOWN), ModelFallback(second(p)), *c),
        "ModelFallback, cut": lambda p, c: agent_of(ScriptedModel(p, CUT), ModelFallback(second(p)), *c),
        "ModelFallback, refuses": lambda p, c: agent_of(
            ScriptedModel(p, ["half"], finish="content_filter"), ModelFallback(second(p)), *c
        ),
        "ModelFallback, judges": lambda p, c: agent_of(
            ScriptedModel(p, ["half"]), ModelFallback(second(p), fallback_on=refused), *c
        ),
        "ModelFallback, one without a stream": lambda p, c: agent_of(
            ScriptedModel(p, DOWN), ModelFallback(Unstreamed(p, ANSWER, name="second")), *c
        ),
        "ModelFallback, no model of its own": lambda p, c: agent_of(
            None, ModelFallback(ScriptedModel(p, DOWN), second(p)), *c
        ),
    }


def shout(text: str) -> str:
    return text.upper()


def found(name: str) -> str:
    """Return what was found."""
    return f"found {name}"


def deferring(p: Probe, c: Caps) -> Made:
    agent = agent_of(
        ScriptedModel(p, [ToolCallPart("later", {}, tool_call_id="d1"), *CALL]),
        *c,
        output_type=[str, DeferredToolRequests],
    )

    @agent.tool_plain
    def later() -> str:
        raise CallDeferred

    return agent


OUTPUTS: dict[str, Callable[[Probe, Caps], Made]] = {
    "text": lambda p, c: agent_of(plain(p), *c, output_type=str),
    "tool": lambda p, c: agent_of(ScriptedModel(p, CALL, [CITY]), *c, output_type=City),
    "tool, early": lambda p, c: agent_of(ScriptedModel(p, [CITY, *CALL]), *c, output_type=City),
    "ToolOutput": lambda p, c: agent_of(ScriptedModel(p, [CITY]), *c, output_type=ToolOutput(City)),
    "NativeOutput": lambda p, c: agent_of(ScriptedModel(p, CALL, JSON), *c, output_type=NativeOutput(City)),
    "PromptedOutput": lambda p, c: agent_of(ScriptedModel(p, CALL, JSON), *c, output_type=PromptedOutput(City)),
    "TextOutput": lambda p, c: agent_of(plain(p), *c, output_type=TextOutput(shout)),
    "a function": lambda p, c: agent_of(ScriptedModel(p, [CITY]), *c, output_type=found),
    "a union": lambda p, c: agent_of(ScriptedModel(p, CALL, ANSWER), *c, output_type=[str, City]),
    "deferred": deferring,
    "retried": lambda p, c: agent_of(
        ScriptedModel(p, [ToolCallPart("final_result", {}, tool_call_id="f0")], [CITY]), *c, output_type=City
    ),
}


def model_cases() -> Iterator[tuple[str, Make]]:
    for name, model in MODELS.items():

        def make(p: Probe, c: Caps, model: Callable[[Probe], Model] = model) -> Made:
            return agent_of(model(p), *c)

        yield f"model: {name}", make


CASES: dict[str, Make] = {
    **dict(model_cases()),
    **{f"capability: {name}": make for name, make in CAPABILITIES.items()},
    **{f"output: {name}": make for name, make in OUTPUTS.items()},
}


@pytest.mark.parametrize("case", CASES)
async def test_a_run_ends_as_without_agx(configured: Redis, case: str) -> None:
    for number, entry in enumerate(ENTRY_POINTS):
        expected = await outcome_of(entry, CASES[case], None)
        assert expected.output is not None or expected.error is not None
        observed = await outcome_of(entry, CASES[case], agx.AgxCapability())
        assert (entry, observed) == (entry, expected)
        streamed = await outcome_of(entry, CASES[case], agx.AgxCapability(1, 1, f"s{number}"))
        assert (entry, streamed) == (entry, expected)
        entries = await read_stream(configured, f"agx:1:1:s{number}")
        assert [e.type for e in entries].count("end") == 1
        if expected.output is not None:
            assert "answer" in [e.name for e in entries]


LIVE = [
    "model: plain",
    "model: WrapperModel",
    "model: InstrumentedModel",
    "model: ConcurrencyLimitedModel",
    "capability: ProcessHistory",
    "capability: ReinjectSystemPrompt",
    "capability: Instrumentation",
    "capability: Hooks of tools",
    "output: NativeOutput",
    "output: tool",
]


@pytest.mark.parametrize("case", LIVE)
async def test_tokens_of_the_common_chains_are_live(configured: Redis, case: str) -> None:
    outcome: Outcome = await outcome_of("run", CASES[case], agx.AgxCapability(1, 1, "s"))
    assert outcome.error is None
    entries = await read_stream(configured)
    said = [e.name for e in entries]
    if case == "output: tool":
        assert said.index("answer") < said.index("llm-end", said.index("answer"))  # recognised while it came
    else:
        assert "part_delta" in said
