"""Runs of the routers that another replica of the service goes on with: what they store, and who takes them over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from pydantic_ai.agent import AbstractAgent

from ..checkpoints.job import Job
from ..jobs.recipe import Call, Recipe
from ..jobs.worker import Worker
from .route import Lifespan
from .runs import WebRun
from .turns import Turn, TurnSession

Recipes = Mapping[str, Recipe]

_AT_ONCE = 100  # runs of other processes that a replica goes on with at the same time


def find_recipe(agent: AbstractAgent[Any, Any], recipes: Recipes | None) -> str | None:
    """Return the name of the recipe that resumes an agent's runs; None where the router has no recipes.

    Raises:
        ValueError: none of them is the agent's.
    """
    if recipes is None:
        return None
    if agent.name is None or agent.name not in recipes:
        raise ValueError(f"recipes must have one for the router's agent, under its name {agent.name!r}")
    return agent.name


def make_lifespan(recipes: Recipes | None) -> Lifespan | None:
    """Return the lifespan of a router: while the app runs, it goes on with runs whose process died."""
    if recipes is None:
        return None
    resumed = {name: _as_web_run(recipe) for name, recipe in recipes.items()}

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker = Worker(resumed, at_once=_AT_ONCE)
        recovering = asyncio.create_task(worker.recover(), name="agx-web-recovery")
        try:
            yield
        finally:
            worker.stop()
            await recovering

    return lifespan


def _as_web_run(recipe: Recipe) -> Recipe:
    """Return a recipe whose run shows and stores what a router's run does."""

    async def make(job: Job) -> Call:
        call = await recipe(job)
        # The conversation is prepared already: the turn's first attempt has stored it.
        session = TurnSession(stored=call.session, turn=Turn(job.prompt, list))
        capabilities = [*(call.kwargs.get("capabilities") or ()), WebRun(session=session)]
        return replace(call, session=session, kwargs={**call.kwargs, "capabilities": capabilities})

    return make
