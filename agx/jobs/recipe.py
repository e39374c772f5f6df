"""Recipes: how a worker makes an agent's run from a job."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai.agent import AbstractAgent

from ..checkpoints.job import Job
from ..runs.deps import Deps
from ..sessions.base import Session


@dataclass(frozen=True, slots=True)
class Call:
    """What a recipe returns: the arguments of `agx.run()` but for the prompt, which the job holds.

    Args:
        session: the conversation.
        agent: the agent.
        deps: its dependencies; their ids must be the job's.
        kwargs: reach `Agent.iter()`, for example `model` or `usage_limits`.
    """

    session: Session
    agent: AbstractAgent[Any, Any]
    deps: Deps
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Recipe = Callable[[Job], Awaitable[Call]]
