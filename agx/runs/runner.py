"""`run()`: drives an agent, streams it, and saves its session on every outcome."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic_ai.agent import AbstractAgent
from pydantic_ai.messages import UserContent
from pydantic_ai.run import AgentRunResult

from ..checkpoints.codec import dump_results
from ..checkpoints.job import Job
from ..control.on_busy import OnBusy, check_on_busy, open_when_free
from ..engine.registry import current_engine
from ..errors import JobError
from ..redis.keys import SessionKeys
from ..sessions.base import Session
from ..stream.events import Runtime
from .deps import Deps
from .drive import Drive
from .opening import open_streamed

DepsT = TypeVar("DepsT", bound=Deps)
OutputT = TypeVar("OutputT")

# An event loop keeps only weak references to tasks: a bare `create_task(run(...))` would be collected.
_tasks: set[asyncio.Task[Any]] = set()


def run(
    session: Session,
    agent: AbstractAgent[DepsT, OutputT],
    user_prompt: str | Sequence[UserContent] | None,
    deps: DepsT,
    *,
    resume: str | None = None,
    args: dict[str, Any] | None = None,
    on_busy: OnBusy = "reject",
    **kwargs: Any,
) -> Coroutine[Any, Any, AgentRunResult[OutputT]]:
    """Run an agent: every event goes to the session's stream, facts to operators, and the session is saved.

    Wraps `Agent.iter()`, and returns what `agent.run()` would.

    Args:
        session: the conversation; loaded before, saved after, on every outcome. What is saved is what pydantic-ai's
            `all_messages()` gives, so a history processor's changes stay; the prompt is always in it.
        agent: any of pydantic-ai's agents.
        user_prompt: any prompt that pydantic-ai takes.
        deps: the agent's dependencies; they have its scope, user and session.
        resume: name of the recipe with which a worker resumes the run if this process dies. `user_prompt`, `args` and
            `deferred_tool_results` are stored for it as JSON; other `kwargs` are not, so the recipe has to give the
            same ones. None: nothing is stored, and the run is lost with its process.
        args: the recipe's arguments, JSON values, at most 64 KiB.
        on_busy: what to do where the session has a live run. `reject` raises. `enqueue` waits in this process until
            the session is free. `interrupt` cancels the live run, whose partial answer is stored, and then runs.
            `steer` gives the live run a prompt that is a text (`steer()`); where it can take no more, it waits.
        kwargs: reach `Agent.iter()`, for example `model` or `usage_limits`. A `message_history` takes the place of the
            loaded conversation, and is saved in its place.

    Raises:
        AgxCanceledError: the run was cancelled; `.messages` holds the partial conversation.
        SessionBusyError: the session has a live run.
        SteeredError: the live run takes the prompt; `.run_id` is its id.
        QueueFullError: 20 runs of this process wait for the session.
        RedisUnavailableError: Redis could not be reached within 2 s at the start; nothing was run.
        SessionSaveError: `session.save()` failed; `.result` and `.messages` hold what it should have kept.
        LeaseLostError: another run took the session over while this process was stalled.
        RunHandedOverError: the service shut down, and another process resumes the run.
        JobError: `resume` or `args`, or the prompt of a run that can be resumed, can't be used.
        asyncio.CancelledError: the task was cancelled from outside.
        Exception: whatever the agent, its tools or `session.load()` raised.
    """
    # Not a coroutine function: each token would pass one coroutine more.
    return run_turn(session, agent, user_prompt, deps, kwargs, resume=resume, args=args, on_busy=on_busy)


async def run_turn(
    session: Session,
    agent: AbstractAgent[DepsT, OutputT],
    user_prompt: str | Sequence[UserContent] | None,
    deps: DepsT,
    kwargs: dict[str, Any],
    *,
    resume: str | None,
    args: dict[str, Any] | None = None,
    on_busy: OnBusy = "reject",
    goes_on_from: str | None = None,
) -> AgentRunResult[OutputT]:
    """Run an agent as `run()` does.

    Args:
        goes_on_from: fingerprint of the stored messages that the run goes on from, where it drops those after them.
    """
    check_on_busy(on_busy)
    if args is not None and resume is None:
        raise JobError('args are for the recipe that resumes the run: name it with resume="..."')
    engine = current_engine()
    keys = SessionKeys.of(engine.config.key_prefix, deps.get_scope_id(), deps.user_id, deps.session_id)
    task = asyncio.current_task()
    assert task is not None
    _tasks.add(task)
    try:
        job = None
        if resume is not None:
            job = replace(_make_job(keys, resume, user_prompt, args, kwargs), goes_on_from=goes_on_from)
        deps.runtime = Runtime()
        life = await open_when_free(
            engine,
            keys,
            on_busy,
            user_prompt,
            lambda: open_streamed(
                engine, agent.name or "agent", keys, runtime=deps.runtime, follows=deps.follows, job=job
            ),
        )
        drive = Drive(life, session, job=job)
        with drive.noting_errors():
            await drive.run_agent(agent, user_prompt, deps, kwargs)
        return await drive.end()
    finally:
        _tasks.discard(task)


def _make_job(
    keys: SessionKeys,
    recipe: str,
    prompt: str | Sequence[UserContent] | None,
    args: dict[str, Any] | None,
    kwargs: dict[str, Any],
) -> Job:
    results = kwargs.get("deferred_tool_results")
    return Job(
        run_id=uuid.uuid4().hex,
        scope_id=keys.scope,
        user_id=keys.user,
        session_id=keys.session,
        agent=recipe,
        prompt=prompt,
        args={} if args is None else args,
        results=None if results is None else dump_results(results),
    )
