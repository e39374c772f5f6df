"""`feedback()`: records what somebody thinks of a run that has ended. Out: a fact in the scope queue of the run."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from dataclasses import replace
from typing import TypedDict, Unpack

from redis.exceptions import RedisError

from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import RedisUnavailableError, RunUnknownError
from ..facts.reader import QueuePages
from ..facts.schema import NodeEnded, RunEnded, RunFeedback, RunStarted, span_id
from ..redis import keys
from ..redis.keys import Id, SessionKeys, check_id
from ..redis.retry import retry
from ..telemetry.tracing import captures_content

MAX_NAME = 50  # characters: a name is the value of a metric's label
MAX_VALUE = 100
MAX_COMMENT = 4_096  # characters
_ACKNOWLEDGE = 5.0  # seconds


async def feedback(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    run_id: str,
    name: str,
    value: float,
    comment: str | None = None,
    by: str | None = None,
    key: str | None = None,
) -> None:
    """Record a score of a run that has ended: in its trace, and in `agx_feedback_total` and `agx_feedback_score`.

    The run is found among the scope's facts, of which Redis keeps the newest (`Config(queue_max_length=...)`).

    Args:
        name: what is scored, such as `thumb`; at most 50 characters, those of an id.
        value: the score, from 0 to 100; a thumb is 1 or 0.
        comment: why; at most 4,096 characters. It counts as content: it is exported only where content capture is on.
        by: who gave it, as an id.
        key: makes a repeat harmless: a second score of the run with this name and key is not counted.

    Raises:
        RunUnknownError: the session has no such run that has ended, or its facts are gone.
        TypeError: an id, the value or the comment has a wrong type.
        ValueError: an id has a character that none may have, or the value or the comment is out of bounds.
        RedisUnavailableError: Redis can't be reached; repeat the call with the same key.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    check_id(run_id, "run_id")
    _check(name, value, comment)
    by = None if by is None else check_id(by, "by")
    own_key = uuid.uuid4().hex if key is None else check_id(key, "key")
    try:
        await retry(engine.ready)
        found = await retry(lambda: _find_run(engine, session, run_id))
        if found is None:
            raise RunUnknownError(run_id)
        comment = comment if captures_content() else None
        fact = _make_fact(*found, own_key, name=name, value=float(value), by=by, comment=comment)
        async with asyncio.timeout(_ACKNOWLEDGE):
            await engine.queues.put_acknowledged(fact)
    except (RedisError, OSError) as error:  # TimeoutError is an OSError
        raise RedisUnavailableError("record the feedback", error) from error


def _check(name: str, value: float, comment: str | None) -> None:
    if len(check_id(name, "name")) > MAX_NAME:
        raise ValueError(f"name must have at most {MAX_NAME} characters")
    if not isinstance(value, int | float):
        raise TypeError(f"value must be a number, not {type(value).__name__}")
    if not (math.isfinite(value) and 0 <= value <= MAX_VALUE):
        raise ValueError(f"value must be from 0 to {MAX_VALUE}")
    if comment is not None and not isinstance(comment, str):
        raise TypeError(f"comment must be a str, not {type(comment).__name__}")
    if comment is not None and len(comment) > MAX_COMMENT:
        raise ValueError(f"comment must have at most {MAX_COMMENT} characters")


class _Given(TypedDict):
    name: str
    value: float
    by: str | None
    comment: str | None


def _make_fact(end: RunEnded, model: str, key: str, **given: Unpack[_Given]) -> RunFeedback:
    # A name for the fact and its span that a repeat has again.
    text = f"{given['name']}/{key}"
    what = f"feedback.{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    return RunFeedback(
        id=f"{end.run_id}:{what}",
        scope=end.scope,
        user=end.user,
        session=end.session,
        run_id=end.run_id,
        parent_run_id=end.parent_run_id,
        agent=end.agent,
        service=end.service,
        trace=replace(end.trace, span_id=span_id(end.run_id, what), parent_span_id=end.trace.span_id),
        at_ns=time.time_ns(),
        model=model,
        **given,
    )


async def _find_run(engine: Engine, session: SessionKeys, run_id: str) -> tuple[RunEnded, str] | None:
    """Return how a run of the session ended, and the model of its last request; None where its end is not known."""
    queue = keys.queue(session.prefix, keys.partition(session.scope, engine.queues.partitions or 1))
    needle, end = run_id.encode(), None
    async for page in QueuePages(engine.control.execute, queue, newest_first=True):
        for entry in page:
            # Nearly all facts are other runs': a look at the bytes costs a hundredth of parsing them.
            if needle not in entry.payload:
                continue
            fact = entry.fact
            owner = (session.scope, session.user, session.session, run_id)
            if not isinstance(fact, RunEnded | NodeEnded | RunStarted) or owner != (
                fact.scope,
                fact.user,
                fact.session,
                fact.run_id,
            ):
                continue
            if isinstance(fact, RunEnded):
                end = fact
            elif end is not None and isinstance(fact, NodeEnded) and fact.model is not None:
                return end, fact.model.request_model
            elif end is not None and isinstance(fact, RunStarted):
                return end, ""
        await asyncio.sleep(0)
    return None if end is None else (end, "")
