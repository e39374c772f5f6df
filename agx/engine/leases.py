"""Leases: the proof that a run's process is alive, and the fallback by which a cancel can't be missed (contract, 4)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from ..errors import SessionBusyError
from ..facts.schema import Reason
from ..redis import keys
from ..redis.bus import Bus, Script
from ..redis.clock import ServerClock
from ..redis.supervisor import Supervisor

logger = logging.getLogger("agx")

_BUSY_WAIT = 1.0  # seconds a run waits for the lease of one that has ended
_BUSY_POLL = 0.05
_RENEW_AGAIN = 0.5  # seconds after renewals that had no answer
_SLICE = 500  # leases renewed in one round trip: tokens of the same loop wait no longer than that
_REFRESH = 3_600.0  # seconds between refreshes of the expiries that last a day

_ACQUIRE = Script("""
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return {0, held} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local t = redis.call('TIME')
return {1, t[1] * 1000 + math.floor(t[2] / 1000)}
""")

# Only the owner removes it, marked or not.
_RELEASE = Script("""
local held = redis.call('GET', KEYS[1])
if held and (held == ARGV[1] or string.find(held, 'cancel:' .. ARGV[1] .. ':', 1, true) == 1) then
  return redis.call('DEL', KEYS[1])
end
return 0
""")

# The longest lease_ttl and the first service's partitions hold for all.
_META = Script("""
redis.call('HSETNX', KEYS[1], 'format', ARGV[1])
redis.call('HSETNX', KEYS[1], 'partitions', ARGV[2])
local ttl = redis.call('HGET', KEYS[1], 'lease_ttl')
if not ttl or tonumber(ttl) < tonumber(ARGV[3]) then redis.call('HSET', KEYS[1], 'lease_ttl', ARGV[3]) end
redis.call('EXPIRE', KEYS[1], ARGV[4])
return redis.call('HGET', KEYS[1], 'partitions')
""")
META_FORMAT = 1


@dataclass(eq=False, slots=True)
class Lease:
    """One run's lease. `on_cancel(reason, mark_ms)` and `on_lost()` are called at most once, synchronously."""

    session: keys.SessionKeys
    run_id: str
    on_cancel: Callable[[Reason, int | None], None]
    on_lost: Callable[[], None]
    confirmed: float = field(default_factory=time.monotonic)  # when the last renewal that was answered was asked for
    taken: float = field(default_factory=time.monotonic)  # when it was last taken, not only renewed
    breaks: int = 0  # the bus's count of broken connections at that time
    settled: bool = False  # cancelled or lost: nobody needs to be told again

    def settle_cancel(self, reason: Reason, mark_ms: int | None) -> None:
        if not self.settled:
            self.settled = True
            self.on_cancel(reason, mark_ms)

    def settle_lost(self) -> None:
        self.settled = True
        self.on_lost()


class Leases:
    """All leases of a loop, renewed together by one task every third of their TTL."""

    def __init__(self, bus: Bus, prefix: str, clock: ServerClock, supervisor: Supervisor, *, ttl: float) -> None:
        self._bus = bus
        self._supervisor = supervisor
        self._prefix = prefix
        self._clock = clock
        self._ttl_ms = int(ttl * 1_000)
        self._held: dict[str, Lease] = {}
        self._renewal: asyncio.Task[None] | None = None
        self._partitions = 1
        self._refreshed = time.monotonic()
        self._meta_args: tuple[int | float, ...] = ()

    async def publish_meta(self, partitions: int) -> int:
        """Write what the sidecar has to know; returns the number of partitions in force on this prefix."""
        self._meta_args = (META_FORMAT, partitions, self._ttl_ms / 1_000, keys.INDEX_TTL)
        self._partitions = int(await self._bus.run(_META, keys.meta(self._prefix), *self._meta_args))
        return self._partitions

    async def acquire(self, lease: Lease) -> None:
        """Take the lease, waiting a second where its holder has ended already.

        Raises:
            SessionBusyError: the session has a live run.
            RedisError, OSError: not taken as far as is known.
        """
        session, deadline = lease.session, time.monotonic() + _BUSY_WAIT
        while True:
            asked_ns = time.monotonic_ns()
            taken, value = await self._bus.run(_ACQUIRE, session.live, lease.run_id, self._ttl_ms)
            if taken:
                break
            top = await self._bus.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
            ended = bool(top) and top[0][1].get(b"type") == b"end"
            # A reaper holds it for the moment in which it closes the dead run before.
            if not (ended or value.startswith(b"reaper:")) or time.monotonic() > deadline:
                raise SessionBusyError(session.session)
            await asyncio.sleep(_BUSY_POLL)
        self._clock.sync(int(value), asked_ns)
        lease.confirmed, lease.taken, lease.breaks = asked_ns / 1e9, time.monotonic(), self._bus.breaks
        self._held[lease.run_id] = lease
        self._announce([lease])
        self._enter_index(lease)
        if self._renewal is None:
            self._renewal = self._supervisor.start(self._renew_all, name="agx-leases")

    async def release(self, lease: Lease) -> None:
        """Give the lease up, last of all; a lease that is not ours any more is left alone."""
        self.forget(lease)
        session = lease.session
        await self._bus.run(_RELEASE, session.live, lease.run_id)
        self._bus.execute("ZREM", session.index, session.session)
        await self._bus.execute("ZREM", self._deadlines(session), session.lease_member(lease.run_id))

    async def abandon(self, lease: Lease) -> None:
        """Give up the lease of a run that could not be begun; its deadline stays.

        Its `begin` may have been appended all the same, or arrive yet: a sidecar looks when the deadline has passed.
        """
        self.forget(lease)
        await self._bus.run(_RELEASE, lease.session.live, lease.run_id)

    def holds(self, lease: Lease) -> bool:
        """Return whether a lease can't have expired: its last renewal was confirmed less than its TTL ago."""
        return time.monotonic() - lease.confirmed < self._ttl_ms / 1_000

    def refresh_soon(self) -> None:
        """Write again what lasts a day, as of the next renewal: a failed server may have lost it."""
        self._refreshed = float("-inf")
        if self._meta_args:
            self._bus.run(_META, keys.meta(self._prefix), *self._meta_args)

    def forget(self, lease: Lease) -> None:
        """Stop renewing a lease without touching Redis: it is another's, or the process is to be taken for dead."""
        self._held.pop(lease.run_id, None)
        if not self._held and self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    def _enter_index(self, lease: Lease) -> None:
        session = lease.session
        self._bus.execute("ZADD", session.index, self._clock.now_ms(), session.session)
        self._bus.execute("EXPIRE", session.index, keys.INDEX_TTL)

    def _deadlines(self, session: keys.SessionKeys) -> str:
        return keys.leases(self._prefix, keys.partition(session.scope, self._partitions))

    def _announce(self, leases: list[Lease]) -> None:
        """Write deadlines: a hint for whoever looks for dead runs, so a lost one costs nothing but time."""
        by_key: dict[str, list[str | int]] = {}
        deadline = self._clock.now_ms() + self._ttl_ms
        for lease in leases:
            member = lease.session.lease_member(lease.run_id)
            by_key.setdefault(self._deadlines(lease.session), []).extend((deadline, member))
        for key, pairs in by_key.items():
            self._bus.execute("ZADD", key, *pairs)
            self._bus.execute("EXPIRE", key, keys.INDEX_TTL)

    async def _renew_all(self) -> None:
        period = wait = self._ttl_ms / 3_000
        while True:
            await asyncio.sleep(wait)
            leases, confirmed, wait = list(self._held.values()), list[Lease](), period
            for start in range(0, len(leases), _SLICE):
                some = leases[start : start + _SLICE]
                answered = await self._renew(some, confirmed)
                if answered < len(some):
                    wait = min(_RENEW_AGAIN, period)  # an outage uses the time up that a lease has left
                if not answered:
                    break
            if time.monotonic() - self._refreshed > _REFRESH:
                self._refreshed = time.monotonic()
                self._bus.run(_META, keys.meta(self._prefix), *self._meta_args)
                for lease in confirmed:
                    self._enter_index(lease)

    async def _renew(self, leases: list[Lease], confirmed: list[Lease]) -> int:
        """Renew some leases in one round trip; add those that are ours to `confirmed`, return how many answers came."""
        # GETEX renews and reads in one command, and never brings a deleted lease back.
        asked = time.monotonic()
        renewals = [self._bus.execute("GETEX", lease.session.live, "PX", self._ttl_ms) for lease in leases]
        ours, answered = [], 0
        for lease, renewal in zip(leases, renewals, strict=True):
            try:
                value = await renewal  # all but the first are there by then: no callback, no wait
            except (RedisError, OSError):
                continue
            answered += 1
            if lease.run_id in self._held and await self._judge(lease, value, asked):
                ours.append(lease)
        ours = [lease for lease in ours if lease.run_id in self._held]  # not given up meanwhile
        self._announce(ours)
        confirmed += ours
        return answered

    async def _judge(self, lease: Lease, value: bytes | None, asked: float) -> bool:
        """Decide what a renewal's reply means; returns whether the lease is ours."""
        if value is None:
            unbroken = lease.breaks == self._bus.breaks
            if unbroken and self.holds(lease):
                # Nobody but a seed client deletes a lease: that is how it cancels.
                lease.settle_cancel("lease_deleted", None)
                return False
            # It expired while we could not renew it: the run goes on unless someone else has begun one.
            asked = time.monotonic()
            try:
                taken, _ = await self._bus.run(_ACQUIRE, lease.session.live, lease.run_id, self._ttl_ms)
            except (RedisError, OSError):
                return False
            if not taken:
                lease.settle_lost()
                return False
            lease.taken = time.monotonic()
            logger.warning("agx: the lease of session %s had expired and was taken again", lease.session.session)
        elif value.startswith(b"cancel:"):
            _, run_id, mark_ms = value.decode().split(":")
            if run_id != lease.run_id:
                lease.settle_lost()
                return False
            lease.settle_cancel("cancel", int(mark_ms))
        elif value != lease.run_id.encode():
            lease.settle_lost()
            return False
        lease.confirmed, lease.breaks = asked, self._bus.breaks
        return True

    def close(self) -> None:
        """Stop renewing; leases that are still held expire by themselves."""
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
