"""A run's life around its agent: opened (lease, then `begin`), closed (`end`, then the fact, then the lease)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from ..engine.engine import Engine
from ..errors import SessionBusyError
from ..facts.schema import Reason
from ..stream.entry import DELETED
from .dead_attempts import DeadAttempts
from .driving_task import wait_to_end
from .outcome import Ending
from .recording.recorder import Recorder

if TYPE_CHECKING:
    from ..engine.lease import Lease

logger = logging.getLogger("agx")

_CLOCKS_DIFFER_MS = 5_000  # at most, between two nodes of a cluster

# The run that the current code belongs to, and the tool call; None for the code of a hook.
_place: ContextVar[tuple[Recorder, str | None] | None] = ContextVar("agx_place", default=None)


@contextlib.contextmanager
def working_in(recorder: Recorder, call_id: str | None = None) -> Iterator[None]:
    """Set the run, and its tool call, that code in this block and the tasks that it starts belong to."""
    token = _place.set((recorder, call_id))
    try:
        yield
    finally:
        _place.reset(token)


def enclosing_recorder() -> Recorder | None:
    """Return the live run that the current code is a part of, if any."""
    place = _place.get()
    return place[0] if place is not None and place[0].state.is_open else None


def enclosing_call() -> str | None:
    """Return the tool call of that run that the current code is a part of, if any."""
    place = _place.get()
    return None if place is None else place[1]


class RunLifecycle:
    """A run between its `begin` and its `end`; without a lease it is observed only and touches no stream."""

    def __init__(
        self, engine: Engine, recorder: Recorder, lease: Lease | None = None, before: DeadAttempts | None = None
    ) -> None:
        self.engine = engine
        self.recorder = recorder
        self.before = before  # the run's attempts in processes that died
        self._lease = lease
        self.on_shutdown: Callable[[], None] | None = None  # hands the run over; None where nobody could resume it
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        engine.runs.add(self)

    def cancel(self, reason: Reason, mark_ms: int | None) -> None:
        """Stop the run; the first reason holds. At the service's shutdown a run that can be resumed is handed over."""
        if reason == "shutdown" and self.on_shutdown is not None:
            self.on_shutdown()
            return
        self.recorder.state.cancel(reason, mark_ms)

    async def take_lease_again(self) -> None:
        """Take the lease of a run that was fenced, if nobody holds the session; `close()` gives it back.

        Raises:
            SessionBusyError: another run holds the session, or it was deleted.
            RedisError, OSError: not taken as far as is known.
        """
        assert self._lease is not None
        session = self._lease.session
        last = await self.engine.control.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
        if last and last[0][1].get(b"body") == DELETED:
            raise SessionBusyError(session.session)
        await self.engine.leases.acquire(self._lease)

    async def check_lease(self) -> None:
        """Renew the lease now. A run whose session another process holds by now is fenced when this returns."""
        assert self._lease is not None
        await self.engine.leases.renew(self._lease)

    async def close(self, ending: Ending) -> None:
        """Hand the last events over, and wait until all is emitted and the lease is given back, at most `lease_ttl`.

        After that time the rest continues in the background: Redis trouble delays no answer further. An observed run
        waits for nothing. A caller that is cancelled meanwhile gets its CancelledError when this is done.
        """
        self.recorder.finish(ending)
        if self._lease is None:
            self.recorder.state.acknowledge()
            self.recorder.report(ending)
            self._settle()
            return
        closing = asyncio.get_running_loop().create_task(self._close(ending, self._lease), name="agx-close")
        self.engine.keep(closing)
        if not await wait_to_end(closing, self.engine.config.lease_ttl):
            logger.warning("agx: run %s has ended, but Redis has not taken all of it yet", self.recorder.run_id)

    async def hand_over(self) -> None:
        """Let another process go on with the run: nothing of it is lost, and nothing is ended."""
        recorder, lease = self.recorder, self._lease
        assert recorder.events.writer is not None
        assert lease is not None
        await recorder.events.writer.drain()
        if self.before is not None:
            await self.before.finish()
        await self.engine.queues.drain()
        leases, is_fenced = self.engine.leases, recorder.state.fenced
        if not is_fenced:
            recorder.state.hand_over()
        # Facts of a fenced run were dropped: the next process has to reconstruct them, as for a process that died.
        how = leases.give_back if is_fenced else leases.hand_over
        left = asyncio.get_running_loop().create_task(give_up(lease, how), name="agx-hand-over")
        self.engine.keep(left)  # a shutdown waits for it: a lease that is left to expire delays the next process
        self._settle()
        await left

    async def _close(self, ending: Ending, lease: Lease) -> None:
        """Emit the end, then give the lease back: whatever one step raises, the next ones follow."""
        recorder = self.recorder
        try:
            if recorder.events.writer is not None:
                await recorder.events.writer.drain()
            if self.before is not None:
                await self.before.finish()
            if recorder.state.phase == "ended":
                if await self._is_recovered(lease):
                    recorder.state.recover()
                else:
                    await recorder.report(ending)
        except Exception as error:
            self.engine.supervisor.note(error, "agx-close")
        finally:
            self._settle()
            # Without the fact of its end the deadline stays, so that a recovery looks at the run.
            leases, is_counted = self.engine.leases, recorder.state.phase in ("reported", "recovered")
            # Where another process goes on with the run, a cancel that has marked this lease is kept for that one.
            left = leases.abandon if self.on_shutdown is None else leases.give_back
            await give_up(lease, leases.release if is_counted else left)

    def _settle(self) -> None:
        """Leave the engine: nothing of this run is to be cancelled, ordered or waited for any more."""
        engine, recorder, lease = self.engine, self.recorder, self._lease
        engine.runs.discard(self)
        if lease is not None and recorder.events.writer is not None:
            recorder.events.writer.close()
        if lease is not None and engine.sessions.get(lease.session.stream) is recorder.events:
            del engine.sessions[lease.session.stream]
            engine.subscription.unsubscribe(lease.session.cancel_channel)
        if not self.closed.done():
            self.closed.set_result(None)

    async def _is_recovered(self, lease: Lease) -> bool:
        """Return whether a sidecar has emitted this run's end, because it took the process for dead."""
        recorder = self.recorder
        if recorder.state.confirmed or recorder.state.end_ms is None:
            return False
        try:
            with contextlib.suppress(SessionBusyError):
                await self.engine.leases.acquire(lease)  # from here on no sidecar begins to finalize it
            since_ms = recorder.state.end_ms - _CLOCKS_DIFFER_MS
            return await self.engine.queues.has_end(lease.session, recorder.run_id, since_ms)
        except (RedisError, OSError):
            return False  # a fact that is emitted twice counts once


async def give_up(lease: Lease, how: Callable[[Lease], Awaitable[object]]) -> None:
    """Give a lease back with `how`; one that can't be given back expires by itself, since nobody renews it."""
    try:
        await how(lease)
    except Exception as error:
        logger.warning(
            "agx: the lease of session %s is left to expire (%s)", lease.session.session, type(error).__name__
        )
