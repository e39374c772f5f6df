"""`pending()` and `decide()`: the tool calls that wait for a person or another system, and what is decided on them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import orjson
from redis.exceptions import RedisError

from ..checkpoints.job import Job
from ..control.approvals import Approvals, Decision, PendingCall
from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import ConversationChangedError, JobError, NotPendingError, RedisUnavailableError
from ..redis.keys import Id, SessionKeys, check_id
from ..redis.retry import retry
from ..runs.deferred import open_approvals, results_of
from .submit import append_job

logger = logging.getLogger("agx")


async def pending(scope_id: Id, user_id: Id | None = None) -> list[PendingCall]:
    """Return the tool calls that wait in a scope, or of one of its users, the oldest first.

    Raises:
        TypeError, ValueError: an id can't be used.
        RedisUnavailableError: Redis can't be reached.
    """
    engine, scope = current_engine(), check_id(scope_id, "scope_id")
    user = None if user_id is None else check_id(user_id, "user_id")
    try:
        await retry(engine.ready)
        calls = await retry(lambda: open_approvals(engine).read_scope(scope))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("list what waits", error) from error
    return [call for call in calls if call.decision is None and user in (None, call.user_id)]


async def decide(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    call_id: str,
    approve: bool = True,
    args: dict[str, Any] | None = None,
    result: Any = None,
    by: str | None = None,
    key: str | None = None,
) -> str | None:
    """Decide on a tool call that waits; with the last decision of its run, a worker goes on.

    Args:
        call_id: the call's id.
        approve: False denies the call.
        args: take the place of the arguments that the model gave; JSON values.
        result: of a call that is made elsewhere (`CallDeferred`); a JSON value.
        by: who decides; for the log, and for others that look at the call.
        key: makes a repeat harmless.

    Returns:
        The id of the run that goes on. None where further calls of the run wait, or where the run was started without
        a recipe: then the service goes on with it (`run(deferred_tool_results=...)`, or a router's decision).

    Raises:
        NotPendingError: the call does not wait, or it is not one of this session.
        ConversationChangedError: somebody else has decided on the call.
        QueueFullError: the decision is stored; the run goes on as soon as the scope has fewer waiting jobs.
        JobError: `args` or `result` are not JSON values.
        TypeError, ValueError: an id can't be used.
        RedisUnavailableError: Redis can't be reached; repeat the call with the same key.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    decision = Decision(approve=approve, args=args, result=result, by=by, key=key)
    calls = await record_decision(engine, session, call_id, decision)
    return None if not calls or calls[0].recipe is None else await go_on(engine, calls)


async def record_decision(
    engine: Engine, session: SessionKeys, call_id: str, decision: Decision
) -> list[PendingCall] | None:
    """Store a decision; returns the calls of the run, or None while some of them wait. Raises as `decide()`."""
    try:
        orjson.dumps(decision)
    except orjson.JSONEncodeError as error:
        raise JobError(f"args and result must be JSON values: {error}") from None
    try:
        await retry(engine.ready)
        approvals = open_approvals(engine)
        held = await retry(lambda: approvals.decide(session, call_id, decision))
        calls = await retry(lambda: _reread(approvals, session))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("decide on the call", error) from error
    if held is None:
        raise NotPendingError(f"no call {call_id!r:.80} waits in session {session.session!r}")
    if held != decision and (held.key is None or held.key != decision.key):
        raise ConversationChangedError(f"call {call_id!r:.80} is decided already")
    decided = next((call for call in calls if call.call_id == call_id), None)
    if decided is not None:
        _report(engine, decided, decision)
    return calls if calls and all(call.decision is not None for call in calls) else None


async def _reread(approvals: Approvals, session: SessionKeys) -> list[PendingCall]:
    ids = (session.scope, session.user, session.session)
    return [call for call in await approvals.read_scope(session.scope) if call.session == ids]


def _report(engine: Engine, call: PendingCall, decision: Decision) -> None:
    fields = {"run_id": call.run_id, "session": "/".join(call.session), "tool": call.tool, "by": decision.by}
    logger.info(
        "agx: call %s of tool %s was %s by %s", call.call_id, call.tool, decision.kind, decision.by, extra=fields
    )
    engine.queues.put(call.make_fact(decision, engine.clock.now_ms()))


async def go_on(engine: Engine, calls: Sequence[PendingCall]) -> str:
    """Submit the run that goes on with decided calls, once; returns its id."""
    first = calls[0]
    assert first.recipe is not None
    session = SessionKeys.of(engine.config.key_prefix, *first.session)
    name = "/".join([first.run_id, *sorted(call.call_id for call in calls)])
    job = Job(
        # Two processes that submit it, or one that died in between, give it one id: it runs once.
        run_id=hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=16).hexdigest(),
        scope_id=first.scope_id,
        user_id=first.user_id,
        session_id=first.session_id,
        agent=first.recipe,
        results=results_of(calls),
        **first.job,
    )
    await append_job(engine, session, job, job.encode())
    await open_approvals(engine).remove(session, [call.call_id for call in calls])
    return job.run_id


async def expire_calls(engine: Engine) -> None:
    """Deny the calls whose time has passed, and go on with runs whose decider has died before it could.

    Raises:
        RedisError, OSError: Redis did not answer.
    """
    approvals, now_ms = open_approvals(engine), engine.clock.now_ms()
    for partition in range(approvals.partitions):
        sessions: dict[tuple[str, str, str], list[PendingCall]] = {}
        for call in await approvals.read(partition):
            sessions.setdefault(call.session, []).append(call)
        for ids, calls in sessions.items():
            session = SessionKeys.of(engine.config.key_prefix, *ids)
            complete = all(call.decision is not None for call in calls)
            for call in calls:
                if call.decision is None and call.expires_ms is not None and call.expires_ms <= now_ms:
                    try:
                        expired = Decision(approve=False, by="expires_in", expired=True)
                        found = await record_decision(engine, session, call.call_id, expired)
                    except (ConversationChangedError, NotPendingError):
                        continue
                    complete = found is not None
            if complete and calls[0].recipe is not None:
                await go_on(engine, await _reread(approvals, session))
