"""Adds a front end's tools and state to a run. A job has both in its arguments, under `agx_front_end`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_ai import ExternalToolset, FunctionToolset
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.tools import DeferredToolRequests, ToolDefinition

from ..runs.deps import Deps

ARGUMENT = "agx_front_end"  # reserved name in a job's arguments


def add_front_end(
    agent: AbstractAgent[Any, Any], deps: Deps, kwargs: Mapping[str, Any], args: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a run with the front end's tools. The run leaves calls of these tools to the front end.

    A state is set on deps that have a `state` (pydantic-ai's `StateHandler`); if theirs is a pydantic model, as that.

    Raises:
        ValidationError: the state is not one of the deps' model.
        ValueError: a tool has the name of one of the agent's.
    """
    front_end = args.get(ARGUMENT) or {}
    if state := front_end.get("state"):
        _set_state(deps, state)
    tools = [
        ToolDefinition(name=tool["name"], description=tool["description"], parameters_json_schema=tool["parameters"])
        for tool in front_end.get("tools") or ()
    ]
    if not tools:
        return dict(kwargs)
    # Other kinds of toolsets know their tools only within a run, where pydantic-ai refuses the second of a name.
    toolsets = [*agent.toolsets, *(kwargs.get("toolsets") or ())]
    own = {name for toolset in toolsets if isinstance(toolset, FunctionToolset) for name in toolset.tools}
    if taken := sorted(own & {tool.name for tool in tools}):
        raise ValueError(f"the agent has a tool of its own that is named {taken[0]!r}")
    outputs = kwargs.get("output_type") or agent.output_type
    may_defer = isinstance(outputs, list | tuple) and DeferredToolRequests in outputs
    return {
        **kwargs,
        "toolsets": [*(kwargs.get("toolsets") or ()), ExternalToolset(tools)],
        # Another type than the agent's own can't be given where it has output validators.
        "output_type": outputs if may_defer else [outputs, DeferredToolRequests],
    }


def _set_state(deps: Deps, state: Any) -> None:
    from pydantic_ai.ui import StateHandler  # noqa: PLC0415 - it takes 75 ms, and few runs have a state

    if isinstance(deps, StateHandler):
        own = deps.state
        deps.state = type(own).model_validate(state) if isinstance(own, BaseModel) else state
