"""The private names of pydantic-ai that agx reads are still there (`agx/model_calls/private_api.py`)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import AbstractCapability, Hooks
from pydantic_ai.exceptions import RunCancelled, RunTimedOut
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, FunctionModel

from agx.model_calls.private_api import cancel_was_requested, has_registered_hook, run_timed_out


class Ending(AbstractCapability[Any]):
    """Reads the two names where a run ends."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    async def wrap_run(self, ctx: RunContext[Any], *, handler: Any) -> Any:
        try:
            return await handler()
        finally:
            self.seen.append((run_timed_out(ctx), cancel_was_requested(ctx)))


async def waits(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_timeout_and_a_cancel_can_be_distinguished() -> None:
    ending = Ending()
    with pytest.raises(RunTimedOut):
        await Agent(FunctionModel(waits), capabilities=[ending]).run("hi", timeout=0.01)

    class Stops(AbstractCapability[Any]):
        async def before_model_request(self, ctx: RunContext[Any], request_context: Any) -> Any:
            ctx.cancel()
            return request_context

    with pytest.raises(RunCancelled):
        await Agent(FunctionModel(waits), capabilities=[ending, Stops()]).run("hi")
    assert ending.seen == [(True, True), (False, True)]


def test_the_registered_hooks_are_known() -> None:
    hooks: Hooks[Any] = Hooks(before_run=lambda ctx: None)
    assert not has_registered_hook(hooks, ("after_model_request",))
    assert has_registered_hook(hooks, ("before_run",))
