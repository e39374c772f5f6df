"""How a run is opened: an observed one at once, a streamed one with its lease and its `begin`."""

from __future__ import annotations

import asyncio
import time
import uuid
from functools import partial
from typing import Any

import orjson
from redis.exceptions import RedisError

from ..checkpoints.job import Job
from ..control.inbox import STEER_HINT, Inbox
from ..engine.engine import Engine
from ..engine.lease import Lease
from ..engine.starting import starting
from ..errors import RedisUnavailableError, SessionBusyError
from ..facts.json_values import replace_surrogates
from ..redis.keys import SessionKeys
from ..redis.live_key import new_holder, parse_live
from ..redis.redis_py import Reply
from ..redis.retry import COMMAND_TIMEOUT, retry
from ..stream.entry import RUNTIME, Body
from ..stream.events import Runtime
from ..stream.writer import SessionWriter
from ..telemetry.tracing import describe_run, start_run, valid_traceparent
from .driving_task import run_to_end
from .lifecycle import RunLifecycle, enclosing_call, enclosing_recorder, give_up
from .outcome import Ending
from .recording.recorder import Recorder
from .recording.run_events import RunEvents, open_sub_agent
from .state import RunState


def open_observed(engine: Engine, agent: str, scope: str) -> RunLifecycle:
    """Begin a run without a session. It never waits for Redis: its facts, and a sub-agent's events, wait in memory."""
    engine.ready_later()
    recorder = _make_recorder(engine, uuid.uuid4().hex, agent, scope, state=_new_state())
    recorder.state.begin()
    run = RunLifecycle(engine, recorder)
    recorder.emit_start()
    recorder.events.put("begin", RUNTIME, {})
    engine.heartbeat.start()
    return run


async def open_streamed(
    engine: Engine,
    agent: str,
    session: SessionKeys,
    *,
    runtime: Runtime | None = None,
    follows: str | None = None,
    job: Job | None = None,
    due_ms: int | None = None,
) -> RunLifecycle:
    """Begin a run on a session; a caller that is cancelled meanwhile leaves no lease, and no `begin` without `end`.

    Args:
        follows: traceparent of what caused the run; by default that of the session's run before.
        job: how another process can go on with the run; None where none can.
        due_ms: server time from which the run could begin, if it waited in the jobs queue.

    Raises:
        SessionBusyError: the session has a live run.
        RedisUnavailableError: Redis can't be reached within 2 s.
    """
    with starting(session):
        opening = asyncio.ensure_future(
            _Opening(engine, agent, session, runtime=runtime, follows=follows, job=job, due_ms=due_ms).run()
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # One cancellation goes on into the opening, which then cleans up undisturbed.
            opening.cancel()
            await run_to_end(_abandon(opening))
            raise


async def _abandon(opening: asyncio.Future[RunLifecycle]) -> None:
    await asyncio.wait({opening})
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().close(Ending("cancelled", "task"))


class _Opening:
    """The steps of opening a streamed run."""

    def __init__(
        self,
        engine: Engine,
        agent: str,
        session: SessionKeys,
        *,
        runtime: Runtime | None,
        follows: str | None,
        job: Job | None,
        due_ms: int | None,
    ) -> None:
        self._engine = engine
        self._agent = agent
        self._session = session
        self._runtime = runtime
        self._follows = follows
        # The state exists before the lease: a cancellation that comes while `begin` is on its way is not lost.
        self._state = _new_state()
        self._job = job
        self._due_ms = due_ms
        self._called_ns = time.time_ns()
        self._checkpoint = None if job is None else job.encode()  # raises before Redis is touched
        run_id = uuid.uuid4().hex if job is None else job.run_id
        # Of two workers that have the same job, one holds the lease.
        holder = "" if job is None else new_holder(run_id, job.attempt)
        recover = 0.0 if job is None else job.recover
        self._lease = Lease(session, run_id, self._state.cancel, self._state.fence, holder, recover=recover)

    async def run(self) -> RunLifecycle:
        try:
            if self._engine.queues.partitions is None:
                await retry(self._engine.ready)
            return await self._take_lease()
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("start the run", error) from error

    async def _take_lease(self) -> RunLifecycle:
        engine, session, lease = self._engine, self._session, self._lease
        writer: SessionWriter | None = None
        try:
            found = await retry(lambda: engine.leases.acquire(lease))
            recorder = _make_recorder(
                engine,
                lease.run_id,
                self._agent,
                session.scope,
                state=self._state,
                session=session,
                runtime=self._runtime,
                follows=valid_traceparent(self._follows) or valid_traceparent(_traceparent_of(found.first)),
            )
            recorder.called_ns = self._find_called_ns()
            writer = SessionWriter(
                engine.write_side,
                session,
                retention=engine.config.retention,
                on_end=self._state.acknowledge,
                on_fenced=self._state.fence,
            )
            # If this fails, a sidecar may have to emit the run's span: so nobody ends it here.
            body = _begin_body(recorder, session.session, self._job)
            await writer.begin(
                body,
                origin=RUNTIME,
                last=found.last,
                ensure_lease=partial(engine.leases.ensure, lease),
                checkpoint=self._checkpoint,
            )
        except BaseException as error:
            if writer is not None and writer.begun:
                # Redis has the `begin`: a listener that gets it has to get an `end`.
                await self._end_unwanted(RunLifecycle(engine, recorder, lease), writer, error)
            elif isinstance(error, SessionBusyError):
                engine.leases.forget(lease)
            else:
                await self._give_up_lease(error)
            raise
        run = RunLifecycle(engine, recorder, lease)
        try:
            self._start(run, writer)
        except BaseException as error:
            await run.close(Ending("failed", error=error))
            raise
        return run

    def _find_called_ns(self) -> int:
        """Return when the run was asked for: `run()` was called, or its job was due."""
        if self._due_ms is None:
            return self._called_ns
        return time.time_ns() - max(0, self._engine.clock.now_ms() - self._due_ms) * 1_000_000

    def _start(self, run: RunLifecycle, writer: SessionWriter) -> None:
        start_streamed(run, writer, self._lease)
        waited_ms = None if self._due_ms is None else max(0, self._engine.clock.now_ms() - self._due_ms)
        run.recorder.emit_start(waited_ms)

    async def _end_unwanted(self, run: RunLifecycle, writer: SessionWriter, error: BaseException) -> None:
        self._engine.supervisor.call(lambda: self._start(run, writer), name="agx-opening")
        cancelled = isinstance(error, asyncio.CancelledError)
        await run.close(Ending("cancelled", "task") if cancelled else Ending("failed", error=error))

    async def _give_up_lease(self, error: BaseException) -> None:
        """Give the lease back, before the caller may begin the next run; an outage is not waited for."""
        giving_up = asyncio.get_running_loop().create_task(give_up(self._lease, self._engine.leases.abandon))
        self._engine.keep(giving_up)
        if not isinstance(error, (RedisError, OSError)):
            await asyncio.wait({giving_up}, timeout=COMMAND_TIMEOUT)


def start_streamed(run: RunLifecycle, writer: SessionWriter, lease: Lease) -> None:
    """Let a run begin whose `begin`, or `resume`, is acknowledged."""
    engine, recorder = run.engine, run.recorder
    recorder.events.writer = writer
    lease.on_retaken = writer.check_owner
    # A sidecar that finalized the run has given the lease back, and its `end` is in the stream.
    recorder.state.is_confirmed = lambda: engine.leases.holds(lease) and writer.proved >= lease.taken
    recorder.state.begin()
    engine.sessions[writer.stream] = recorder.events
    engine.heartbeat.start()
    recorder.steered.inbox = Inbox(engine.control, lease.session)
    _follow_channel(engine, lease, recorder)


def _new_state() -> RunState:
    parent = enclosing_recorder()
    return RunState(None if parent is None else parent.state)


def _make_recorder(
    engine: Engine,
    run_id: str,
    agent: str,
    scope: str,
    *,
    state: RunState,
    session: SessionKeys | None = None,
    runtime: Runtime | None = None,
    follows: str | None = None,
) -> Recorder:
    agent = replace_surrogates(agent)  # it becomes an attribute of spans, which exporters encode as UTF-8
    attributes = describe_run(run_id, agent, scope, session)
    parent, call_id = enclosing_recorder(), enclosing_call()
    events = RunEvents(state, runtime or Runtime())
    # Not for an agent in a hook, whose steps are not for listeners, and not in another event loop than the writer's.
    if session is None and parent is not None and parent.engine is engine and call_id is not None:
        events = open_sub_agent(
            state, parent.events, run=run_id, parent_run=parent.run_id, agent=agent, call_id=call_id
        )
    return Recorder(
        engine,
        run_id=run_id,
        agent=agent,
        scope=scope,
        session=session,
        state=state,
        span=start_run(run_id, agent, attributes=attributes, ratio=engine.config.trace_ratio, follows=follows),
        events=events,
        parent=parent,
        follows=follows,
    )


def _begin_body(recorder: Recorder, session_id: str, job: Job | None) -> Body:
    engine, span = recorder.engine, recorder.span
    resumable: Body = {} if job is None else {"recover": job.recover, "max_attempts": job.max_attempts}
    return {
        "session_id": session_id,
        "run_id": recorder.run_id,
        "traceparent": span.traceparent,
        "agent": recorder.agent,
        "follows": recorder.follows,
        # What a sidecar has to know to finish a run whose process died (contract, section 5).
        "service": engine.service.name,
        "sdk": span.trace.sdk,
        "parent_span_id": span.trace.parent_span_id,
        "retention": engine.config.retention,
        "waited_ms": max(0, recorder.start_ns - recorder.called_ns) // 1_000_000,
    } | resumable


def _traceparent_of(first: Any) -> object:
    """Return the traceparent of the run that the session held before, while its stream is kept."""
    try:
        return orjson.loads(first[0][1][b"body"])["traceparent"]
    except (IndexError, KeyError, TypeError, orjson.JSONDecodeError):
        return None


def _follow_channel(engine: Engine, lease: Lease, recorder: Recorder) -> None:
    live, channel, state = lease.session.live, lease.session.cancel_channel, recorder.state

    def on_message(raw: bytes) -> None:
        if raw == STEER_HINT:
            recorder.steered.look()
        else:
            on_mark(raw)

    def on_mark(raw: bytes) -> None:
        value = parse_live(raw)
        if value.kind == "cancelled" and value.holder == lease.holder:
            state.cancel("cancel", value.mark_ms)

    def look() -> None:
        # For a mark or a message that came before the subscription, or while it was broken.
        recorder.steered.look()
        engine.control.execute("GET", live).add_done_callback(on_found)

    def on_found(held: asyncio.Future[Reply]) -> None:
        if held.exception() is None and held.result() is not None:
            on_mark(held.result())

    engine.subscription.subscribe(channel, on_message, look)
