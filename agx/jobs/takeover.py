"""Takes over a run whose process died: takes its lease, then appends `resume` (contract, section 4)."""

from __future__ import annotations

import asyncio
import logging

from ..engine.engine import Engine
from ..engine.lease import Lease
from ..recovery.dead_run import DeadRun
from ..recovery.recorded_run import RecordedRun
from ..redis.live_key import new_holder
from ..redis.retry import retry
from ..runs.dead_attempts import DeadAttempts
from ..runs.deps import Deps
from ..runs.lifecycle import RunLifecycle, give_up
from ..runs.opening import start_streamed
from ..runs.outcome import Ending
from ..runs.recording.recorder import Recorder
from ..runs.recording.run_events import RunEvents
from ..runs.state import RunState
from ..stream.entry import RUNTIME, Body
from ..stream.events import Runtime
from ..stream.writer import SessionWriter
from ..telemetry import conventions as names
from ..telemetry.tracing import continue_run, describe_run, start_run

logger = logging.getLogger("agx")


async def open_taken_over(engine: Engine, dead: DeadRun, agent: str, deps: Deps | None) -> RunLifecycle | None:
    """Go on with a dead run; returns None where another process holds it, or the stream has changed meanwhile.

    Raises:
        RedisError, OSError: Redis did not answer.
    """
    state = RunState()
    holder = new_holder(dead.run_id, dead.job.attempt)
    lease = Lease(dead.session, dead.run_id, state.cancel, state.fence, holder, recover=dead.job.recover)
    if not await retry(lambda: engine.leases.take_over(lease)):
        return None
    writer = SessionWriter(
        engine.write_side,
        dead.session,
        retention=engine.config.retention,
        on_end=state.acknowledge,
        on_fenced=state.fence,
    )
    try:
        recorder = _make_recorder(engine, dead, agent, state, deps)
        void_runs = [one.run_id for one in dead.record.sub_agents if one.is_under_way]
        body: Body = {
            "run_id": dead.run_id,
            "attempt": dead.job.attempt,
            "traceparent": recorder.span.traceparent,
            "void": dead.void,
            **({"void_runs": void_runs} if void_runs else {}),
            **({"handed_over": True} if dead.record.handed_over else {}),
        }
        resumed = await writer.resume(body, origin=RUNTIME, after=dead.last_id, seq=dead.record.next_seq)
    except BaseException:
        if writer.begun:
            writer.close()
        await asyncio.shield(give_up(lease, engine.leases.give_back))
        raise
    if not resumed:
        # A cancel that has marked the lease meanwhile is kept for the run's process, or for the next one.
        await give_up(lease, engine.leases.give_back)
        return None
    engine.leases.announce(lease)
    life = RunLifecycle(engine, recorder, lease, DeadAttempts(engine, dead, state))
    try:
        start_streamed(life, writer, lease)
        recorder.emit_resume(dead.job.attempt, _last_alive_ns(dead, engine.config.lease_ttl), dead.record.last_attempt)
    except BaseException as error:
        await life.close(Ending("failed", error=error))
        raise
    fields = {"run_id": dead.run_id, "attempt": dead.job.attempt}
    logger.info("agx: run %s continues here, attempt %d", *fields.values(), extra=fields)
    return life


def _last_alive_ns(dead: DeadRun, lease_ttl: float) -> int:
    """Return the last time at which the process before was known to be alive.

    That is its last entry, or the last renewal of its lease if that was later. `lease_ttl`, in seconds, is this
    process's own, which is equal in a fleet.
    """
    renewed_ms = -dead.deadline_ms if dead.record.handed_over else dead.deadline_ms - lease_ttl * 1_000
    return max(dead.record.last_ns, int(renewed_ms) * 1_000_000)


def _span_before(record: RecordedRun) -> str | None:
    """Return the traceparent of the attempt before, to which this one's span is linked."""
    trace = None if record.last_attempt is None else record.last_attempt.trace
    return None if trace is None else f"00-{trace.trace_id}-{trace.span_id}-{'01' if trace.sampled else '00'}"


def _make_recorder(engine: Engine, dead: DeadRun, agent: str, state: RunState, deps: Deps | None) -> Recorder:
    record, session = dead.record, dead.session
    begin = record.begin
    trace = None if begin is None else begin.trace
    attributes = describe_run(dead.run_id, agent, session.scope, session) | {names.ATTEMPT: str(dead.job.attempt)}
    # A `begin` without a trace was written by another version: the run gets a new one.
    span = (
        start_run(dead.run_id, agent, attributes=attributes, ratio=engine.config.trace_ratio, follows=None)
        if trace is None
        else continue_run(dead.run_id, agent, trace, attributes=attributes, before=_span_before(record))
    )
    runtime = Runtime()
    if record.requests:
        last = max(record.requests, key=lambda request: request.idx)
        runtime = Runtime(last.idx, answered=last.is_answer, returned=set(last.returns))
    if deps is not None:
        deps.runtime = runtime
    recorder = Recorder(
        engine,
        run_id=dead.run_id,
        agent=agent if begin is None else begin.agent,
        scope=session.scope,
        session=session,
        state=state,
        span=span,
        events=RunEvents(state, runtime),
        parent=None,
        follows=None if begin is None else begin.follows,
    )
    recorder.continue_from(record)
    return recorder
