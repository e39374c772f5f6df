"""The calls with which a run ends: listed for those who decide on them, until the session's next run begins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelResponse, ToolCallPart
from pydantic_ai.tools import DeferredToolRequests
from redis.exceptions import RedisError

from ..checkpoints.job import Job
from ..control.approvals import Approvals, Kind, PendingCall
from ..engine.engine import Engine
from ..stream.events import parse_args, to_plain, to_readable
from .recording.recorder import Recorder

logger = logging.getLogger("agx")

_LONGEST = 1e9  # seconds until a call expires; a date beyond the year 9999 can't be shown


async def list_calls(engine: Engine, recorder: Recorder, requests: DeferredToolRequests, job: Job | None) -> None:
    """List the calls with which a run ends; an outage leaves them to those who follow the run."""
    assert recorder.session is not None
    try:
        await open_approvals(engine).add(recorder.session, _describe(engine, recorder, requests, job))
    except (RedisError, OSError) as error:
        logger.warning("agx: the waiting calls of run %s are not listed (%s)", recorder.run_id, type(error).__name__)


def _describe(
    engine: Engine, recorder: Recorder, requests: DeferredToolRequests, job: Job | None
) -> Iterator[PendingCall]:
    session, now_ms = recorder.session, engine.clock.now_ms()
    assert session is not None
    kinds: tuple[tuple[Kind, list[ToolCallPart]], ...] = (("approval", requests.approvals), ("result", requests.calls))
    for kind, calls in kinds:
        for call in calls:
            yield PendingCall(
                scope_id=session.scope,
                user_id=session.user,
                session_id=session.session,
                run_id=recorder.run_id,
                agent=recorder.agent,
                call_id=to_readable(call.tool_call_id),  # as the stored messages have it
                tool=call.tool_name,
                args=to_plain(parse_args(call)),
                kind=kind,
                since_ms=now_ms,
                expires_ms=_expiry_of(call.tool_name, recorder.tools.metadata_of(call.tool_name), now_ms),
                recipe=None if job is None else job.agent,
                job={} if job is None else {"args": job.args, "recover": job.recover, "max_attempts": job.max_attempts},
                fact=dict(recorder.tools.describe_decision(call.tool_call_id)),
            )


def _expiry_of(tool: str, metadata: Mapping[str, Any], now_ms: int) -> int | None:
    expires_in = metadata.get("expires_in")
    if expires_in is None:
        return None
    try:
        return now_ms + int(min(float(expires_in), _LONGEST) * 1_000)
    except (TypeError, ValueError, OverflowError):
        logger.error("agx: expires_in of tool %s must be a number of seconds: its calls do not expire", tool)
        return None


async def forget_calls(engine: Engine, recorder: Recorder, conversation: Sequence[ModelMessage]) -> None:
    """Remove the calls with which the run before ended: this one goes on with them, or without them."""
    last = next((message for message in reversed(conversation) if isinstance(message, ModelResponse)), None)
    if last is not None and last.tool_calls and recorder.session is not None:
        with contextlib.suppress(RedisError, OSError):  # then a decision on them starts a run that is refused
            await open_approvals(engine).remove(recorder.session, [call.tool_call_id for call in last.tool_calls])


def open_approvals(engine: Engine) -> Approvals:
    """Return the waiting calls of the engine's prefix; the number of partitions is known."""
    assert engine.queues.partitions is not None
    return Approvals(engine.control, engine.config.key_prefix, engine.queues.partitions)


def results_of(calls: Sequence[PendingCall]) -> dict[str, Any]:
    """Return the decisions on calls as pydantic-ai's JSON of `DeferredToolResults`."""
    approvals: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for call in calls:
        assert call.decision is not None
        why = "Nobody decided on this call in time." if call.decision.expired else "The tool call was denied."
        if call.kind == "result":
            results[call.call_id] = call.decision.result if call.decision.approve else why
        elif call.decision.approve:
            approvals[call.call_id] = {"kind": "tool-approved", "override_args": call.decision.args}
        else:
            approvals[call.call_id] = {"kind": "tool-denied", "message": why}
    return {"calls": results, "approvals": approvals}
