"""Agents whose tools run other agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

import agx

from .agents import ScopeDeps, complete, prompts

Delegating = Agent[ScopeDeps, str]


def delegating(name: str, *to: Delegating, calls: int = 1, streams: bool = True, **kwargs: Any) -> Delegating:
    """Return an agent that asks each of the others so many times at once, then answers with its name and its prompt."""

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        prompt = prompts(messages)[-1]
        if to and not any(isinstance(message, ModelResponse) for message in messages):
            for n in range(calls * len(to)):
                # The ids are those of the calls of every other agent, too.
                args = f'{{"question": "{prompt}{n}"}}'
                yield {n: DeltaToolCall(f"ask_{n % len(to)}", args, tool_call_id=f"call-{n}")}
            return
        for word in (f"{name} ", "answers ", prompt):
            yield word
            await asyncio.sleep(0)

    model = FunctionModel(stream_function=stream)
    agent: Delegating = Agent(model if streams else complete(model), deps_type=ScopeDeps, name=name, **kwargs)
    for n, other in enumerate(to):
        agent.tool(name=f"ask_{n}")(_asking(other))
    return agent


def _asking(other: Delegating) -> Any:
    async def ask(ctx: RunContext[ScopeDeps], question: str) -> str:
        return (await other.run(question, deps=ctx.deps)).output

    return ask


def observed() -> dict[str, Any]:
    """Return the arguments of an agent whose runs in tools are observed."""
    return {"capabilities": [agx.AgxCapability()]}
