"""Workers in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

import agx

from .agents import FakeSession, ScopeDeps

Recipe = Callable[[agx.Job], Awaitable[agx.Call]]


def make_recipe(before: Callable[[agx.Job], Awaitable[object]] | None = None, **other: Any) -> Recipe:
    """Return a recipe that waits for `before`; `other` takes the place of ids of the job."""
    agent = Agent(TestModel(custom_output_text="Hi"), name="support", deps_type=ScopeDeps)

    async def recipe(job: agx.Job) -> agx.Call:
        if before is not None:
            await before(job)
        ids = {"scope": job.scope_id, "user_id": job.user_id, "session_id": job.session_id} | other
        return agx.Call(FakeSession(), agent, ScopeDeps(**ids))

    return recipe


@asynccontextmanager
async def working(*workers: agx.Worker) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield
    finally:
        for worker in workers:
            worker.stop()
        await asyncio.gather(*tasks)
