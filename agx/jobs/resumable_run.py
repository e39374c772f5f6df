"""A run that any worker can start or resume: driven with its recipe's arguments, handed over, or ended as failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_ai.agent import AbstractAgent
from pydantic_ai.run import AgentRunResult

from ..checkpoints.job import Job
from ..engine.engine import Engine
from ..recovery.dead_run import DeadRun
from ..redis.keys import SessionKeys
from ..runs.deps import Deps
from ..runs.drive import Drive
from ..runs.lifecycle import RunLifecycle
from ..runs.opening import open_streamed
from ..runs.outcome import Ending
from ..sessions.base import Session
from .recipe import Call
from .takeover import open_taken_over


@dataclass(slots=True)
class ResumableRun:
    """A run of this worker.

    Args:
        due_ms: server time from which the job could begin; None for a run that this worker resumes.
        on_begun: called once the run's `begin` is acknowledged.
    """

    session: SessionKeys
    job: Job
    due_ms: int | None = None
    on_begun: Callable[[], object] = lambda: None
    drive: Drive | None = None  # set once the run has begun
    recipe: asyncio.Future[Call] | None = None  # while it makes the agent
    handing_over: bool = False

    @property
    def agent(self) -> str:
        return self.job.agent

    @property
    def member(self) -> str:
        """What identifies the run among those of all sessions: two tenants may choose the same run id."""
        return self.session.lease_member(self.job.run_id)


async def run_job(
    engine: Engine,
    run: ResumableRun,
    dead: DeadRun | None,
    *,
    session: Session,
    agent: AbstractAgent[Any, Any],
    deps: Deps,
    kwargs: dict[str, Any],
) -> AgentRunResult[Any] | None:
    """Run a job, or go on with a dead run; returns None where another process went on with it first.

    Raises:
        Exception: as `agx.run()`.
        RunHandedOverError: another process goes on with the run.
    """
    life = await _open(engine, run, dead, agent.name or run.agent, deps)
    if life is None:
        return None
    run.on_begun()
    run.drive = Drive(life, session, dead=dead, job=run.job)
    if run.handing_over:
        run.drive.hand_over(now=False)
    with run.drive.noting_errors():
        await run.drive.run_agent(agent, run.job.prompt, deps, kwargs)
    return await run.drive.end()


async def fail_run(engine: Engine, run: ResumableRun, dead: DeadRun | None, error: Exception) -> None:
    """End as failed a run whose agent could not be made; no worker resumes it."""
    life = await _open(engine, run, dead, run.agent, None)
    if life is not None:
        run.on_begun()
        await life.close(Ending("failed", error=error))


def hand_over(run: ResumableRun, *, now: bool = False) -> None:
    """Stop a run so that another process resumes it: at its next model request, or at once.

    A run that has not begun yet does not begin.
    """
    run.handing_over = True
    if run.recipe is not None:
        run.recipe.cancel()
    if run.drive is not None:
        run.drive.hand_over(now=now)


async def _open(
    engine: Engine, run: ResumableRun, dead: DeadRun | None, agent: str, deps: Deps | None
) -> RunLifecycle | None:
    if dead is not None:
        return await open_taken_over(engine, dead, agent, deps)
    return await open_streamed(
        engine,
        agent,
        run.session,
        runtime=None if deps is None else deps.runtime,
        follows=None if deps is None else deps.follows,
        job=run.job,
        due_ms=run.due_ms,
    )
