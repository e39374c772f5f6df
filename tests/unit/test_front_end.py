"""What `add_front_end()` does with a front end's tools and state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_ai import Agent, DeferredToolRequests
from pydantic_ai.models.test import TestModel
from support.agents import ScopeDeps

from agx.jobs.front_end import ARGUMENT, add_front_end

TOOLS = [{"name": "pick", "description": "Ask.", "parameters": {"type": "object", "properties": {}}}]


class Door(BaseModel):
    color: str = "white"


@dataclass
class DoorDeps(ScopeDeps):
    state: Any = field(default_factory=Door)


def given(**front_end: Any) -> dict[str, Any]:
    return {ARGUMENT: {"tools": [], "state": {}, **front_end}}


async def test_the_calls_of_its_tools_end_the_run() -> None:
    agent: Agent[ScopeDeps, Any] = Agent(TestModel(call_tools=["pick"]), deps_type=ScopeDeps)
    result = await agent.run("Hi", deps=ScopeDeps(), **add_front_end(agent, ScopeDeps(), {}, given(tools=TOOLS)))
    assert isinstance(result.output, DeferredToolRequests)
    assert [call.tool_name for call in result.output.calls] == ["pick"]


@pytest.mark.parametrize("is_agents", [False, True])
def test_outputs_that_may_be_deferred_already_stay(is_agents: bool) -> None:
    outputs: Any = [str, DeferredToolRequests]
    agent: Agent[Any, Any] = Agent(TestModel(), output_type=outputs if is_agents else str)
    kwargs = {} if is_agents else {"output_type": outputs}
    assert add_front_end(agent, ScopeDeps(), kwargs, given(tools=TOOLS))["output_type"] is outputs


def test_a_run_without_a_front_end_is_as_it_was() -> None:
    kwargs = {"model": "test", "toolsets": []}
    for args in ({}, {ARGUMENT: None}, given()):
        assert add_front_end(Agent(TestModel()), ScopeDeps(), kwargs, args) == kwargs


def test_a_state_is_set_where_the_deps_have_one() -> None:
    agent: Agent[Any, Any] = Agent(TestModel())
    deps, plain = DoorDeps(), DoorDeps(state={})
    add_front_end(agent, deps, {}, given(state={"color": "red"}))
    add_front_end(agent, plain, {}, given(state={"color": 1}))
    add_front_end(agent, ScopeDeps(), {}, given(state={"color": "red"}))
    assert (deps.state, plain.state) == (Door(color="red"), {"color": 1})
    add_front_end(agent, deps, {}, given())
    assert deps.state == Door(color="red")
    with pytest.raises(ValidationError):
        add_front_end(agent, deps, {}, given(state={"color": []}))
