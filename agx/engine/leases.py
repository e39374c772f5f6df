"""Leases: each shows that a run's process is alive, and stores a cancel until the run has read it (contract, 4).

The stream decides how a run ended, the lease only who may write. A run without its lease may still have its `end` in
the stream, and a run that holds its lease may find another run's `end` there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from ..errors import SessionBusyError
from ..redis import keys
from ..redis.bus import Bus
from ..redis.clock import ServerClock
from ..redis.live_key import ACQUIRE, HAND_OVER, RELEASE, RENEW, TAKE_OVER, gap_holder, parse_live
from ..redis.recovery_window import StreamEnds, ask_ends, find_recovery_window, gap_ttl_ms, handover_deadline
from ..redis.redis_py import Reply
from ..redis.retry import retry
from ..redis.supervisor import Supervisor
from .lease import Lease
from .lease_index import LeaseIndex
from .meta_publisher import MetaPublisher

logger = logging.getLogger("agx")

_BUSY_WAIT = 1.0  # seconds a run waits for the lease of one that has ended
_BUSY_POLL = 0.05
_RENEW_AGAIN = 0.5  # seconds after renewals that had no answer
_CLAIM_POLL = 0.1  # seconds between two renewals while a recovery's claim is in force
_EXACT_MS = 1_000  # a first deadline that is further off was computed from a clock that Redis has corrected since
_BEGIN_MARGIN = 4  # a run begins before the last quarter of the TTL: the clocks of a cluster's servers differ
_SLICE = 500  # leases renewed in one round trip: tokens of the same loop wait for one round trip at most
_REFRESH = 3_600.0  # seconds between refreshes of the expiries that last a day


class Leases:
    """All leases of a loop, renewed together by one task every third of their TTL."""

    def __init__(
        self,
        bus: Bus,
        prefix: str,
        clock: ServerClock,
        supervisor: Supervisor,
        meta: MetaPublisher,
        *,
        appends: Bus,
        ttl: float,
        on_data_lost: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._supervisor = supervisor
        self._prefix = prefix
        self._clock = clock
        self._meta = meta
        self._ttl_ms = int(ttl * 1_000)
        self._index = LeaseIndex(bus, prefix, clock, meta, appends=appends, ttl_ms=self._ttl_ms)
        self._on_data_lost = on_data_lost
        self._held: dict[str, Lease] = {}  # by holder: two attempts of a run may meet in one process
        self._renewal: asyncio.Task[None] | None = None
        self._refreshed = time.monotonic()
        self._is_data_lost = False

    async def acquire(self, lease: Lease) -> StreamEnds:
        """Take the lease, waiting a second where its holder has ended already; returns what the stream had then.

        The deadline is in Redis before this returns. So a run has a deadline before it has a `begin`, and a process
        that dies in between leaves no run that recovery can't find.

        Raises:
            SessionBusyError: the session has a live run, or one whose process died and that can be resumed.
            RedisError, OSError: not taken as far as is known.
        """
        session, give_up_at = lease.session, time.monotonic() + _BUSY_WAIT
        deadline_ms = self._index.next_deadline()
        entering = self._index.enter_deadline(lease.run, deadline_ms)
        try:
            while True:
                asked_ns = time.monotonic_ns()
                acquired = self._bus.run(ACQUIRE, session.live, lease.holder, self._ttl_ms)
                first, last = ask_ends(self._bus, session)
                taken, reply = await acquired
                ends = StreamEnds(await first, await last)
                is_entered = bool(await entering)
                if taken:
                    break
                ended = bool(ends.last) and ends.last[0][1].get(b"type") == b"end"
                # A claim is in force for the moment in which a recovery looks at the run before.
                if not (ended or parse_live(reply).kind == "claimed") or time.monotonic() > give_up_at:
                    raise SessionBusyError(session.session)
                await asyncio.sleep(_BUSY_POLL)
            window = await find_recovery_window(self._bus, session, ends, int(reply), self._ttl_ms / 1_000)
            if window is not None and window.run_id != lease.run_id:
                await self._release(lease)
                raise SessionBusyError(session.session)
        except SessionBusyError:
            # Another worker may have the same job: then the deadline is that worker's too.
            if lease.holder == lease.run_id:
                self._index.remove_deadline(lease.run)
            raise
        expires_ms = int(reply) + self._ttl_ms
        if not is_entered or abs(expires_ms - deadline_ms) >= _EXACT_MS:
            deadline_ms = expires_ms
            await self._index.set_deadline(lease.run, deadline_ms)
        lease.begin_until_ms = deadline_ms - self._ttl_ms // _BEGIN_MARGIN
        self._hold(lease, int(reply), asked_ns)
        return ends

    async def ensure(self, lease: Lease, renew: bool = False) -> int:
        """Check that a lease is still held, and return until when its run may begin: the server's time in ms.

        One that may have expired is taken again, and so is any with `renew`.

        Raises:
            SessionBusyError: another run holds the session.
            RedisError, OSError: not known.
        """
        if lease.holder not in self._held:
            raise SessionBusyError(lease.session.session)
        if renew or not self.holds(lease):
            await retry(lambda: self.acquire(lease))
        return lease.begin_until_ms

    async def renew(self, lease: Lease) -> None:
        """Renew a lease now. Its callbacks report what was found; if Redis does not answer, none is called."""
        await self._renew([lease], [])

    async def take_over(self, lease: Lease) -> bool:
        """Take the lease of a run whose process died, once; returns False where another process holds it.

        The deadline does not change before `announce()`. It shows whether the previous process died or handed the run
        over, and the next process needs that too if this one does not resume the run.

        Raises:
            RedisError, OSError: not taken as far as is known.
        """
        asked_ns = time.monotonic_ns()
        taken, reply = await self._bus.run(TAKE_OVER, lease.session.live, lease.holder, self._ttl_ms, lease.run_id)
        if taken:
            self._hold(lease, int(reply), asked_ns)
        return bool(taken)

    def announce(self, lease: Lease) -> None:
        """Write the deadline of a run that this process goes on with."""
        self._announce([lease])

    def _hold(self, lease: Lease, server_ms: int, asked_ns: int) -> None:
        self._clock.sync(server_ms, asked_ns)
        lease.confirmed, lease.taken, lease.breaks = asked_ns / 1e9, time.monotonic(), self._bus.breaks
        self._held[lease.holder] = lease
        lease.index_entry = self._index.enter_session(lease.session)
        if self._renewal is None:
            self._renewal = self._supervisor.start(self._renew_all, name="agx-leases")

    async def release(self, lease: Lease) -> None:
        """Give the lease up and remove its deadline: the run's last fact is acknowledged.

        A lease that is another's by now is left alone.
        """
        if lease.index_entry is not None and not lease.index_entry.done():
            await asyncio.wait({lease.index_entry})  # on another connection, which may be behind
        released = self._release(lease)
        self._index.remove_session(lease.session)
        removed = self._index.remove_deadline(lease.run)
        await released
        await removed

    async def abandon(self, lease: Lease) -> None:
        """Give the lease up and leave its deadline, so that recovery looks at the run.

        For a run whose `begin` may be appended or not, or whose `end` another process may have written. That
        process may have died before the facts were queued.
        """
        await self._release(lease)

    def _release(self, lease: Lease) -> asyncio.Future[Reply]:
        self.forget(lease)
        return self._bus.run(RELEASE, lease.session.live, lease.holder)

    async def hand_over(self, lease: Lease) -> None:
        """Give the lease up and set a deadline that has passed, and wake the workers: one goes on with the run at once.

        A cancel that this run no longer noticed is kept for that process.
        """
        if await self.give_back(lease):
            await self._index.set_deadline(lease.run, handover_deadline(self._clock.now_ms()))
            await self._bus.execute("PUBLISH", keys.jobs_wake_channel(self._prefix), keys.WAKE_HANDED_OVER)

    async def give_back(self, lease: Lease) -> bool:
        """Give up the lease of a run that can be resumed; returns False where another process goes on with it already.

        The deadline stays as it is.
        """
        self.forget(lease)
        session, kept_ms = lease.session, gap_ttl_ms(lease.recover, lease_ttl=self._ttl_ms / 1_000)
        reply = await self._bus.run(HAND_OVER, session.live, lease.holder, gap_holder(lease.run_id), kept_ms)
        return bool(reply != b"another")

    def holds(self, lease: Lease) -> bool:
        """Return whether a lease can't have expired: its last renewal was confirmed less than its TTL ago."""
        return time.monotonic() - lease.confirmed < self._ttl_ms / 1_000

    def refresh_soon(self) -> None:
        """Write again what lasts a day, now or with the next renewal: a failed server may have lost it."""
        self._refreshed = float("-inf")
        self._meta.refresh()

    def forget(self, lease: Lease) -> None:
        """Stop renewing a lease without touching Redis: it is another's, or the process is to be taken for dead."""
        self._held.pop(lease.holder, None)
        if not self._held and self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    def _announce(self, leases: list[Lease]) -> None:
        """Write deadlines: a hint for recovery. If one is lost, recovery only starts later."""
        self._index.move_deadlines(lease.run for lease in leases)
        for lease in leases:
            if lease.recover:
                self._index.touch_session(lease.session)

    async def _renew_all(self) -> None:
        period = wait = self._ttl_ms / 3_000
        while True:
            await asyncio.sleep(wait)
            wait = min(period, await self._renew_once())

    async def _renew_once(self) -> float:
        """Renew all leases; returns the longest time, in seconds, until the next renewal."""
        leases, confirmed, wait = list(self._held.values()), list[Lease](), float("inf")
        for start in range(0, len(leases), _SLICE):
            some = leases[start : start + _SLICE]
            answered, undecided = await self._renew(some, confirmed)
            if answered < len(some):
                wait = min(wait, _RENEW_AGAIN)  # an outage uses up the time that a lease has left
            if undecided:
                wait = min(wait, _CLAIM_POLL)
            if not answered:
                break
        if self._is_data_lost:
            self._is_data_lost = False
            self._on_data_lost()
        if time.monotonic() - self._refreshed > _REFRESH:
            self._refreshed = time.monotonic()
            self._meta.refresh()
            for lease in confirmed:
                lease.index_entry, lease.indexed_at = self._index.enter_session(lease.session), self._refreshed
        return wait

    async def _renew(self, leases: list[Lease], confirmed: list[Lease]) -> tuple[int, int]:
        """Renew some leases in one round trip and add those that are ours to `confirmed`.

        Returns how many renewals were answered, and how many of the answers decide nothing yet.
        """
        sent = time.monotonic()
        renewals = [self._bus.run(RENEW, lease.session.live, lease.holder, self._ttl_ms) for lease in leases]
        ours, answered, undecided = [], 0, 0
        for lease, renewal in zip(leases, renewals, strict=True):
            try:
                raw = await renewal  # all but the first are there by then: no callback, no wait
                if lease.holder not in self._held:
                    answered += 1  # given up meanwhile
                    continue
                is_ours = await self._judge(lease, raw, sent)
            except (RedisError, OSError):
                continue
            answered += 1
            if is_ours:
                ours.append(lease)
            undecided += is_ours is None
        ours = [lease for lease in ours if lease.holder in self._held]  # not given up meanwhile
        self._announce(ours)
        confirmed += ours
        return answered, undecided

    async def _judge(self, lease: Lease, raw: bytes | None, sent: float) -> bool | None:
        """Act on a renewal's reply; returns whether the lease is ours, None where the reply decides nothing.

        A recovery's claim is neither a cancel nor another owner: the recovery may find that the run lives, or end its
        stream, which the next append finds. So the run goes on, unconfirmed, and takes the lease again once the claim
        is gone. The same holds for a value that nobody can read.

        Raises:
            RedisError, OSError: a further question had no answer.
        """
        if raw is None:
            # A lease that was taken again after this command was sent had expired; nobody deleted it.
            return None if lease.confirmed > sent else await self._judge_missing(lease)
        value = parse_live(raw)
        if value.holder == lease.holder:
            lease.confirmed, lease.breaks = sent, self._bus.breaks
            if value.kind == "cancelled":
                lease.on_cancel("cancel", value.mark_ms)
            return True
        if value.is_gap_mark and value.run_id == lease.run_id:
            # Cancelled while this process was stalled, and no other process has taken the run over.
            await self._bus.run(TAKE_OVER, lease.session.live, lease.holder, self._ttl_ms, lease.run_id)
            return None  # the next renewal finds the mark
        if not value.is_anothers:
            return None
        self.forget(lease)
        lease.on_lost()
        return False

    async def _judge_missing(self, lease: Lease) -> bool | None:
        """Act on a missing lease: it was deleted, it has expired, or the server lost its data."""
        if lease.breaks == self._bus.breaks and self.holds(lease):
            # An index entry that the refresh wrote after a loss of data does not show that the lease was deleted.
            is_rewritten = (
                lease.indexed_at > lease.confirmed and lease.index_entry is not None and await lease.index_entry
            )
            if not is_rewritten and await self._index.has(lease.run):
                # Only a client of the older package deletes a lease: that is how it cancels.
                lease.on_cancel("lease_deleted", None)
                return False
            self._is_data_lost = True
        # It expired while it could not be renewed, or all data is gone: the run goes on unless another one has begun.
        sent = time.monotonic()
        taken, reply = await self._bus.run(ACQUIRE, lease.session.live, lease.holder, self._ttl_ms)
        if not taken:
            return await self._judge(lease, reply, sent)
        lease.confirmed, lease.taken, lease.breaks = sent, time.monotonic(), self._bus.breaks
        logger.warning("agx: the lease of session %s had expired and was taken again", lease.session.session)
        lease.on_retaken()
        return True

    def close(self) -> None:
        """Stop renewing; leases that are still held expire by themselves."""
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
