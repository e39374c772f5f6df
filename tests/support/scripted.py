"""Agents whose model says what a test scripts, in the order and in the pieces that the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelResponse, NativeToolCallPart, NativeToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

import agx

Delta = (
    str | dict[int, DeltaToolCall] | dict[int, DeltaThinkingPart] | dict[int, NativeToolCallPart | NativeToolReturnPart]
)


@dataclass
class MyDeps(agx.Deps):
    """Deps of scope 1."""

    def get_scope_id(self) -> agx.redis.keys.Id:
        return 1


def deps(session_id: str = "s", user_id: int = 1) -> MyDeps:
    """Return the deps of a session of scope 1."""
    return MyDeps(user_id=user_id, session_id=session_id)


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
