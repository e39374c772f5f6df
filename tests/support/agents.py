"""Agents and sessions that do what a test scripts: answers, tool calls, errors and waits, in a given order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    NativeToolCallPart,
    NativeToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

import agx
from agx.redis import keys

Delta = (
    str | dict[int, DeltaToolCall] | dict[int, DeltaThinkingPart] | dict[int, NativeToolCallPart | NativeToolReturnPart]
)


@dataclass(kw_only=True)
class ScopeDeps(agx.Deps):
    """Deps of any scope, by default of scope 1, user 1, session s."""

    scope: keys.Id = 1
    user_id: keys.Id = 1
    session_id: keys.Id = "s"

    def get_scope_id(self) -> keys.Id:
        return self.scope


@dataclass
class FakeSession(agx.Session):
    """A session that counts how often it was saved; its hooks fail or wait where a test wants that."""

    saves: int = 0
    load_error: Exception | None = None
    save_error: Exception | None = None
    loading: asyncio.Event = field(default_factory=asyncio.Event)
    saving: asyncio.Event = field(default_factory=asyncio.Event)
    may_load: asyncio.Event | None = None
    may_save: asyncio.Event | None = None

    async def load(self) -> None:
        self.loading.set()
        if self.may_load is not None:
            await self.may_load.wait()
        if self.load_error is not None:
            raise self.load_error

    async def save(self) -> None:
        self.saving.set()
        if self.may_save is not None:
            await self.may_save.wait()
        if self.save_error is not None:
            raise self.save_error
        self.saves += 1


@dataclass
class ScriptedAgent:
    """An agent with one tool, `work`, that streams `words`; a test chooses where it calls the tool, waits or fails."""

    words: tuple[str, ...] = ("one ", "two ", "three")
    call_tool: bool = False
    silent: bool = False  # the model never sends anything
    hold_after: int | None = None  # words after which the model waits for ever
    model_error: Exception | None = None
    tool_error: BaseException | None = None
    hold_tool: bool = False
    cancel_in_tool: bool = False
    on_tool: Callable[[], None] | None = None
    delegate: Agent[Any, str] | None = None  # the tool asks this agent
    streams: bool = True  # the model can stream, and only that
    reached: asyncio.Event = field(default_factory=asyncio.Event)  # the place where the test wants to act

    async def _stream(
        self, messages: list[ModelMessage], info: AgentInfo
    ) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        called_before = any(isinstance(message, ModelResponse) and message.tool_calls for message in messages)
        if self.call_tool and not called_before:
            yield {0: DeltaToolCall(name="work", json_args='{"n"', tool_call_id="call-1")}
            yield {0: DeltaToolCall(json_args=": 1}", tool_call_id="call-1")}
            return
        if self.silent:
            self.reached.set()
            await asyncio.Event().wait()
        for n, word in enumerate(self.words):
            if n == self.hold_after:
                self.reached.set()
                await asyncio.Event().wait()
            if self.model_error is not None and n == 1:
                raise self.model_error
            yield word
            await asyncio.sleep(0)

    def agent(self, **kwargs: Any) -> Agent[agx.Deps, str]:
        model = FunctionModel(stream_function=self._stream)
        agent: Agent[agx.Deps, str] = Agent(
            model if self.streams else complete(model), deps_type=agx.Deps, name="staged", **kwargs
        )

        @agent.tool
        async def work(ctx: RunContext[agx.Deps], n: int) -> str:
            """Work."""
            if self.cancel_in_tool:
                ctx.cancel()
            if self.hold_tool:
                self.reached.set()
                await asyncio.Event().wait()
            if self.on_tool is not None:
                self.on_tool()
            if self.tool_error is not None:
                raise self.tool_error
            if self.delegate is not None:
                return (await self.delegate.run("Sub", deps=ctx.deps)).output
            return f"worked {n}"

        return agent


class Gate:
    """Where a scripted answer waits: `reached` tells the test, `open` lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()


def scripted(*replies: Sequence[Delta | Gate | Exception]) -> FunctionModel:
    """Return a model that streams one reply per request: deltas, waits at gates, or raises."""
    script = iter(replies)

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        for step in next(script):
            if isinstance(step, Gate):
                step.reached.set()
                await step.open.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step
                await asyncio.sleep(0)  # as a real model yields to the loop between chunks

    return FunctionModel(stream_function=stream, model_name="scripted")


def complete(model: FunctionModel) -> FunctionModel:
    """Return a model that gives the same answers, each complete: it does not stream."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        async with model.request_stream(messages, info.model_settings, info.model_request_parameters) as streamed:
            async for _ in streamed:
                pass
        return streamed.get()

    return FunctionModel(answer, model_name=model.model_name)


def call(name: str, *fragments: str, call_id: str = "c1", index: int = 0) -> list[Delta]:
    """Return the deltas of a tool call whose arguments come in these fragments."""
    return [
        {index: DeltaToolCall(name=name, json_args="", tool_call_id=call_id)},
        *({index: DeltaToolCall(json_args=fragment, tool_call_id=call_id)} for fragment in fragments),
    ]


def think(*pieces: str) -> list[Delta]:
    """Return the deltas of a thinking part."""
    return [{0: DeltaThinkingPart(content=piece)} for piece in pieces]


def prompts(messages: Sequence[ModelMessage]) -> list[str]:
    """Return the texts of the user, in their order."""
    requests = [message for message in messages if isinstance(message, ModelRequest)]
    return [str(part.content) for request in requests for part in request.parts if isinstance(part, UserPromptPart)]
