"""`submit()`: queues a run for the workers, from a process that has neither the agent nor a model's key."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from ..checkpoints.job import Job
from ..control.on_busy import MAX_QUEUED, OnBusy, check_on_busy, stop_or_steer
from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import JobError, QueueFullError, RedisUnavailableError, SessionBusyError
from ..listeners.manual import is_live
from ..redis import keys
from ..redis.keys import Id, SessionKeys, check_id
from ..redis.retry import retry
from .queue import JobQueue

if TYPE_CHECKING:
    from pydantic_ai.messages import UserContent

_MAX_DELAY = keys.JOBS_TTL - 86_400  # seconds: a queue without news expires
CLAIM_TTL = 10.0  # seconds; a worker that died before its run began loses its claim after that


async def submit(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    agent: str,
    prompt: str | Sequence[UserContent] | None,
    args: dict[str, Any] | None = None,
    run_id: str | None = None,
    recover: float = 60,
    max_attempts: int = 3,
    delay: float = 0,
    on_busy: OnBusy = "reject",
) -> str:
    """Have a worker run an agent on a session; returns the run's id. Follow the run with `listen()`.

    Args:
        agent: name of the recipe in the workers.
        prompt: what the user asks; None goes on with the stored conversation.
        args: a dict of JSON values for the recipe, at most 64 KiB.
        run_id: makes a repeated submit harmless: the same id runs once, as long as its stream is kept.
        recover: seconds after the death of its process during which the run may be resumed, at most a day.
        max_attempts: attempts in a row without progress after which the run is lost.
        delay: seconds until the run may begin, at most six days.
        on_busy: what to do where the session has a live run. `reject` raises. `enqueue` waits: the waiting jobs of a
            session begin in the order of their submits. `interrupt` cancels the live run, then waits. `steer` gives
            the live run a prompt that is a text, and returns that run's id; where it can take no more, the job waits.

    Raises:
        SessionBusyError: the session has a live run.
        QueueFullError: the scope has as many waiting jobs as it may have, or 20 jobs wait for the session.
        RedisUnavailableError: Redis can't be reached within 2 s; the job may have been queued or not.
        JobError: an argument can't be used. Redis was not asked.
        TypeError, ValueError: an id can't be used.
    """
    _check(delay, on_busy)
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    job = Job(
        run_id=check_id(run_id, "run_id") if run_id is not None else uuid.uuid4().hex,
        scope_id=session.scope,
        user_id=session.user,
        session_id=session.session,
        agent=agent,
        prompt=prompt,
        args={} if args is None else args,
        recover=recover,
        max_attempts=max_attempts,
    )
    data = job.encode()
    if on_busy == "reject":
        if await is_live(scope_id, user_id, session_id) and not await _has_ended(engine, session):
            raise SessionBusyError(session.session)
    elif (live := await stop_or_steer(session, on_busy, prompt, key=run_id)) is not None:
        return live
    await append_job(engine, session, job, data, delay=delay, max_queued=None if on_busy == "reject" else MAX_QUEUED)
    return job.run_id


async def append_job(
    engine: Engine, session: SessionKeys, job: Job, data: bytes, *, delay: float = 0, max_queued: int | None = None
) -> None:
    """Append a job to the queue; raises QueueFullError and RedisUnavailableError."""
    try:
        await retry(engine.ready)
        queue = open_queue(engine, "-")
        full = await queue.submit(
            job, data, delay=delay, max_waiting=engine.config.max_waiting_jobs, max_queued=max_queued
        )
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("submit the run", error) from error
    if full == "scope":
        raise QueueFullError(f"scope {session.scope!r}", f"{engine.config.max_waiting_jobs} jobs")
    if full == "session":
        raise QueueFullError(f"session {session.session!r}", f"{MAX_QUEUED} jobs")


def _check(delay: object, on_busy: object) -> None:
    check_on_busy(on_busy)
    if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay <= _MAX_DELAY:
        raise JobError(f"delay must be from 0 to {_MAX_DELAY} seconds, not {delay!r:.40}")


def open_queue(engine: Engine, worker: str) -> JobQueue:
    """Return the jobs queue of the engine's prefix; the number of partitions is known."""
    partitions = engine.queues.partitions
    assert partitions is not None
    return JobQueue(engine.control, engine.config.key_prefix, partitions, worker=worker, claim_ttl=CLAIM_TTL)


async def _has_ended(engine: Engine, session: SessionKeys) -> bool:
    """Return whether the live run has its `end`, so that its lease is given back soon."""
    try:
        last = await engine.control.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("look at the session", error) from error
    return bool(last) and last[0][1].get(b"type") == b"end"
