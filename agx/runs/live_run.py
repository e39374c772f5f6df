"""A run's life around its agent: opened (lease, then `begin`), closed (`end`, then the fact, then the lease)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import orjson
from redis.exceptions import RedisError

from ..engine.engine import Engine
from ..engine.leases import Lease
from ..engine.starting import starting
from ..errors import RedisUnavailableError, SessionBusyError
from ..facts.schema import Reason
from ..redis.keys import SessionKeys
from ..redis.live_key import parse_live
from ..redis.redis_py import Reply
from ..redis.retry import retry
from ..stream.entry import RUNTIME
from ..stream.events import Runtime
from ..stream.writer import SessionWriter
from ..telemetry import conventions as names
from ..telemetry.tracing import start_run
from .outcome import Ending
from .recorder import Recorder

logger = logging.getLogger("agx")

T = TypeVar("T")

_CLOCKS_DIFFER_MS = 5_000  # at most, between two nodes of a cluster
_STALL = 0.5  # seconds by which a timer is late where the process did not run

# The run in whose tool, or hook, the current code works.
current_recorder: ContextVar[Recorder | None] = ContextVar("agx_recorder", default=None)


def enclosing_recorder() -> Recorder | None:
    """Return the live run that the current code is a part of, if any."""
    recorder = current_recorder.get()
    return None if recorder is None or recorder.finished else recorder


class LiveRun:
    """A run between its `begin` and its `end`; without a session it is observed only and touches no lease or stream."""

    def __init__(self, engine: Engine, recorder: Recorder, lease: Lease | None) -> None:
        self.engine = engine
        self.recorder = recorder
        self._lease = lease
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        engine.runs.add(self)
        engine.heartbeat.start()

    def cancel(self, reason: Reason, mark_ms: int | None) -> None:
        """Stop the run; the first reason holds."""
        self.recorder.cancel(reason, mark_ms)

    @classmethod
    async def open(
        cls,
        engine: Engine,
        *,
        agent: str,
        session: SessionKeys | None,
        scope: str,
        runtime: Runtime | None = None,
        follows: str | None = None,
    ) -> LiveRun:
        """Begin a run.

        Args:
            follows: traceparent of what caused the run; by default that of the session's run before.

        Raises:
            SessionBusyError: the session has a live run.
            RedisUnavailableError: Redis can't be reached within 2 s. A run without a session never needs it.
        """
        run_id = uuid.uuid4().hex
        if session is None:
            try:
                await retry(engine.ready)
            except (RedisError, OSError):
                logger.warning("agx: Redis can't be reached, facts of run %s wait in memory", run_id)
            live = cls(engine, _make_recorder(engine, run_id, agent, scope, runtime=runtime, follows=follows), None)
            live.recorder.started()
            return live
        with starting(session):
            return await cls._open_streamed(engine, run_id, agent, session, runtime=runtime, follows=follows)

    @classmethod
    async def _open_streamed(
        cls,
        engine: Engine,
        run_id: str,
        agent: str,
        session: SessionKeys,
        *,
        runtime: Runtime | None,
        follows: str | None,
    ) -> LiveRun:
        lease: Lease | None = None
        try:
            await retry(engine.ready)
            told = _Told()
            lease = taken = Lease(session, run_id, told.cancel, told.lose)
            await retry(lambda: engine.leases.acquire(taken))
            previous = await retry(lambda: engine.control.execute("XRANGE", session.stream, "-", "+", "COUNT", 1))
            recorder = _make_recorder(
                engine,
                run_id,
                agent,
                session.scope,
                session=session,
                runtime=runtime,
                follows=follows or _traceparent_of(previous),
            )
            writer = SessionWriter(
                engine.writer,
                session,
                engine.clock,
                retention=engine.config.retention,
                on_fenced=recorder.lose,
            )
            try:
                # If this fails, a sidecar may have to tell the run's span: so nobody ends it here.
                await writer.begin(recorder.begin_body(session.session), origin=RUNTIME)
            except asyncio.CancelledError:
                if writer.begun:
                    # It was on its way already, and who saw the `begin` sees the `end`.
                    live = cls._start(engine, recorder, writer, lease, told)
                    lease = None
                    engine.keep(asyncio.get_running_loop().create_task(live.close(Ending("cancelled", "task"))))
                raise
        except BaseException as error:
            if lease is not None:
                giving_up = _give_up(lease, engine.leases.abandon)
                engine.keep(asyncio.get_running_loop().create_task(giving_up))
            if isinstance(error, (RedisError, OSError)):
                raise RedisUnavailableError("start the run", error) from error
            raise
        return cls._start(engine, recorder, writer, lease, told)

    @classmethod
    def _start(cls, engine: Engine, recorder: Recorder, writer: SessionWriter, lease: Lease, told: _Told) -> LiveRun:
        recorder.writer = writer
        # Whoever has finished the run gave the lease free again, and stands in the stream.
        recorder.standing.is_ours = lambda: engine.leases.holds(lease) and writer.proved >= lease.taken
        engine.sessions[writer.stream] = recorder
        live = cls(engine, recorder, lease)
        _follow_cancel(engine, lease)
        recorder.started()
        told.to(recorder)
        return live

    async def close(self, ending: Ending) -> None:
        """Hand the last events over, and wait until all is told and the lease released, at most `lease_ttl`.

        The rest goes on by itself: an answer is never held back by Redis. A caller that is cancelled meanwhile gets
        its CancelledError when this is done.
        """
        self.recorder.finish(ending)
        closing = asyncio.get_running_loop().create_task(self._close(ending), name="agx-close")
        self.engine.keep(closing)
        if not await finish_uncancelled(_settles(closing, self.engine.config.lease_ttl)):
            logger.warning("agx: run %s has ended, but Redis has not taken all of it yet", self.recorder.run_id)

    async def _close(self, ending: Ending) -> None:
        recorder, engine, is_counted = self.recorder, self.engine, False
        try:
            if (writer := recorder.writer) is not None:
                await writer.drain()
                if writer.tail.end_ms is not None:
                    recorder.standing.keep()
            if await self._is_told():
                recorder.standing.suppress()
                is_counted = True
            elif not recorder.standing.fenced:
                await recorder.tell_end(ending)
                is_counted = True
        finally:
            engine.runs.discard(self)
            if recorder.writer is not None:
                recorder.writer.close()
            if self._lease is not None:
                session = self._lease.session
                if engine.sessions.get(session.stream) is recorder:
                    del engine.sessions[session.stream]
                    engine.subscription.unsubscribe(session.cancel_channel)
            if not self.closed.done():
                self.closed.set_result(None)
        if self._lease is not None:
            # Without the fact of its end the deadline stays, so that a recovery looks at the run.
            await _give_up(self._lease, engine.leases.release if is_counted else engine.leases.abandon)

    async def _is_told(self) -> bool:
        """Return whether a sidecar has told this run's end, since it took the process for dead behind its `end`."""
        recorder, lease, writer = self.recorder, self._lease, self.recorder.writer
        if lease is None or writer is None or writer.tail.end_ms is None or recorder.standing.confirmed:
            return False
        since_ms = writer.tail.end_ms - _CLOCKS_DIFFER_MS
        try:
            with contextlib.suppress(SessionBusyError):
                await self.engine.leases.acquire(lease)  # so that no sidecar is at it, nor begins
            return await self.engine.queues.has(recorder.scope, f"{recorder.run_id}:end", since_ms)
        except (RedisError, OSError):
            return False  # what is told twice counts once


async def _settles(closing: asyncio.Task[None], seconds: float) -> bool:
    """Return whether a task is done within so many seconds; those in which the process was held still don't count."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + seconds
        done, _ = await asyncio.wait({closing}, timeout=seconds)
        if done or loop.time() - due < _STALL:
            return bool(done)


class _Told:
    """What the lease said before there was a recorder to say it to."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._cancel: tuple[Reason, int | None] | None = None
        self._lost = False

    def cancel(self, reason: Reason, mark_ms: int | None) -> None:
        self._cancel = (reason, mark_ms)
        if self._recorder is not None:
            self._recorder.cancel(reason, mark_ms)

    def lose(self) -> None:
        self._lost = True
        if self._recorder is not None:
            self._recorder.lose()

    def to(self, recorder: Recorder) -> None:
        self._recorder = recorder
        if self._cancel is not None:
            recorder.cancel(*self._cancel)
        if self._lost:
            recorder.lose()


def _make_recorder(
    engine: Engine,
    run_id: str,
    agent: str,
    scope: str,
    *,
    session: SessionKeys | None = None,
    runtime: Runtime | None,
    follows: str | None = None,
) -> Recorder:
    attributes = {names.RUN_ID: run_id, names.SCOPE_ID: scope, names.AGENT_NAME: agent}
    if session is not None:
        attributes[names.SESSION_ID] = session.session
        attributes[names.CONVERSATION_ID] = names.conversation_id(scope, session.user, session.session)
    return Recorder(
        engine,
        run_id=run_id,
        agent=agent,
        scope=scope,
        session=session,
        span=start_run(run_id, agent, attributes=attributes, ratio=engine.config.trace_ratio, follows=follows),
        runtime=runtime or Runtime(),
        parent=enclosing_recorder(),
        follows=follows,
    )


def _traceparent_of(first: Any) -> str | None:
    """Return the traceparent of the run that the session held before, while it is kept."""
    try:
        header = orjson.loads(first[0][1][b"body"])["traceparent"]
    except (IndexError, KeyError, TypeError, orjson.JSONDecodeError):
        return None
    return header if isinstance(header, str) else None


def _follow_cancel(engine: Engine, lease: Lease) -> None:
    live, channel = lease.session.live, lease.session.cancel_channel

    def look() -> None:
        # For a mark that came before the subscription, or while it was broken.
        engine.control.execute("GET", live).add_done_callback(found)

    def found(held: asyncio.Future[Reply]) -> None:
        if held.exception() is None and held.result() is not None:
            _on_mark(lease, held.result())

    engine.subscription.subscribe(channel, lambda mark: _on_mark(lease, mark), look)


def _on_mark(lease: Lease, raw: bytes) -> None:
    value = parse_live(raw)
    if value.kind == "cancelled" and value.holder == lease.run_id:
        lease.report_cancel("cancel", value.mark_ms)


async def _give_up(lease: Lease, how: Callable[[Lease], Awaitable[None]]) -> None:
    try:
        await how(lease)
    except (RedisError, OSError) as error:
        # It is not renewed any more, so it expires by itself.
        logger.warning(
            "agx: the lease of session %s is left to expire (%s)", lease.session.session, type(error).__name__
        )


async def finish_uncancelled(work: Awaitable[T]) -> T:
    """Await something to its end whatever cancellations arrive; a cancellation is raised afterwards, never lost."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("agx: %s: %s", type(failure).__name__, failure)
        raise cancelled
    return task.result()
