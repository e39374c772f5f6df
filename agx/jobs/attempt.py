"""One attempt at a job: makes the run with its recipe, and starts or resumes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from redis.exceptions import RedisError

from ..checkpoints.job import Job
from ..engine.engine import Engine
from ..errors import AgentNotServedError, AttemptsExhaustedError, RecipeError, RunHandedOverError, SessionBusyError
from ..recovery.dead_run import DeadRun
from ..redis.keys import SessionKeys
from ..runs.driving_task import DrivingTask
from ..stream.entry import StreamEntry
from .front_end import add_front_end
from .queue import JobQueue, Waiting
from .recipe import Call, Recipe
from .resumable_run import ResumableRun, fail_run, run_job

logger = logging.getLogger("agx")

_RENEW_CLAIM = 3.0  # seconds


async def start_job(
    engine: Engine,
    queue: JobQueue,
    waiting: Waiting,
    *,
    recipes: Mapping[str, Recipe],
    claims: int,
    runs: dict[str, ResumableRun],
    postpone: Callable[[str], None],
) -> None:
    """Run a claimed job to its end. The job leaves the queue as soon as its run has begun.

    Args:
        recipes: without the job's agent the run ends as failed.
        claims: how many workers have claimed the job; all but this one stopped before the run began.
        postpone: called with the job's entry id if its run has not begun: the job is tried again later.
    """
    begun = asyncio.Event()
    try:
        job = await queue.read(waiting)
        if job is None:
            logger.error("agx: a job of scope %s can't be read by this version, another worker may", waiting.scope)
        elif _keys(engine, job).lease_member(job.run_id) in runs or await _has_begun(engine, job):
            begun.set()  # submitted twice under one id
            await queue.remove(waiting)
        else:
            await _start(engine, queue, waiting, job, begun, recipes=recipes, claims=claims, runs=runs)
    finally:
        if not begun.is_set():
            postpone(waiting.entry_id)
            with contextlib.suppress(RedisError, OSError):
                await queue.give_back(waiting)


async def _start(
    engine: Engine,
    queue: JobQueue,
    waiting: Waiting,
    job: Job,
    begun: asyncio.Event,
    *,
    recipes: Mapping[str, Recipe],
    claims: int,
    runs: dict[str, ResumableRun],
) -> None:
    """Run a job to its end; `begun` is set once its run has begun. A session with a live run leaves the job waiting."""
    claim = asyncio.get_running_loop().create_task(_keep_claim(queue, waiting, begun))
    run = ResumableRun(_keys(engine, job), job, waiting.due_ms, on_begun=begun.set)
    runs[run.member] = run
    try:
        if claims > job.max_attempts:
            await fail_run(engine, run, None, AttemptsExhaustedError(claims - 1))
        elif (recipe := recipes.get(job.agent)) is None:
            await fail_run(engine, run, None, AgentNotServedError(job.agent))
        else:
            await _attempt(engine, run, recipe, None)
    except SessionBusyError:
        logger.debug("agx: the session of a waiting job has a live run")
    finally:
        del runs[run.member]
        if not begun.is_set():
            claim.cancel()
        await asyncio.wait({claim})


async def resume_run(engine: Engine, dead: DeadRun, recipe: Recipe, runs: dict[str, ResumableRun]) -> None:
    """Go on with a run whose process died, to its end."""
    run = ResumableRun(dead.session, dead.job)
    runs[run.member] = run
    try:
        await _attempt(engine, run, recipe, dead)
    finally:
        del runs[run.member]


async def _attempt(engine: Engine, run: ResumableRun, recipe: Recipe, dead: DeadRun | None) -> None:
    task = DrivingTask()
    try:
        run.recipe = asyncio.ensure_future(recipe(run.job))
        call = await run.recipe
        _check(call, run.job)
        kwargs = add_front_end(call.agent, call.deps, call.kwargs, run.job.args)
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError):
            if run.handing_over:
                raise RunHandedOverError from None
            if task.is_cancelled:
                raise
            # Else the recipe awaited something that was cancelled elsewhere.
        logger.error("agx: the recipe of agent %s failed for run %s", run.agent, run.job.run_id, exc_info=error)
        await fail_run(engine, run, dead, RecipeError(run.agent, error))
        return
    finally:
        run.recipe = None
    await run_job(engine, run, dead, session=call.session, agent=call.agent, deps=call.deps, kwargs=kwargs)


def _check(call: Call, job: Job) -> None:
    ids = (str(call.deps.get_scope_id()), str(call.deps.user_id), str(call.deps.session_id))
    if ids != (job.scope_id, job.user_id, job.session_id):
        raise ValueError(f"the recipe's deps are for {'/'.join(ids)}: make them from the job's ids")


async def _has_begun(engine: Engine, job: Job) -> bool:
    session = _keys(engine, job)
    first = await engine.control.execute("XRANGE", session.stream, "-", "+", "COUNT", 1)
    return bool(first) and StreamEntry.of(*first[0]).body.get("run_id") == job.run_id


async def _keep_claim(queue: JobQueue, waiting: Waiting, begun: asyncio.Event) -> None:
    """Renew the claim until the run has begun, then remove the job."""
    while not begun.is_set():
        with contextlib.suppress(RedisError, OSError):
            await queue.claim(waiting)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RENEW_CLAIM):
                await begun.wait()
    while True:
        with contextlib.suppress(RedisError, OSError):
            await queue.remove(waiting)
            return
        await asyncio.sleep(_RENEW_CLAIM)


def _keys(engine: Engine, job: Job) -> SessionKeys:
    return SessionKeys.of(engine.config.key_prefix, job.scope_id, job.user_id, job.session_id)
