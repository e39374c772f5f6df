"""The reaper: finalizes runs whose process is gone. Every replica looks, one wins each run (contract, section 7).

Nothing that a stream, a queue or an index holds stops it: a run that can't be finalized is logged, left in the index,
and tried again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from redis.exceptions import ResponseError

from agx.facts.schema import FIELD, encode
from agx.recovery.finalize import Finalization, finalize_run
from agx.recovery.missing_facts import read_queued_facts
from agx.recovery.recorded_run import RecordedRun
from agx.redis import keys
from agx.redis.live_key import (
    CLAIM,
    CLAIM_MS,
    RELEASE,
    RENEW,
    LeaseValue,
    gap_holder,
    new_claim,
    parse_live,
)
from agx.redis.recovery_window import window_end_ms
from agx.stream.append_scripts import FINALIZE
from agx.stream.entry import StreamEntry

from ..link import TROUBLE, Link
from ..meta import read_meta
from .postponed import Postponed

logger = logging.getLogger(__name__)

SWEEP = 1.0  # seconds between two looks
_AT_ONCE = 100  # dead runs per partition in one look
_PAGE = 1_000  # entries a read

# For `call_each()`: the members past their deadline, with their deadlines. `argument`: how many to pass over.
_READ_DUE = f"return redis.call('ZRANGEBYSCORE', key, '-inf', now, 'WITHSCORES', 'LIMIT', argument, {_AT_ONCE})"

# Removes a member whose deadline is still the one that was read: a process that has come back has set a later one.
# ARGV: member, deadline.
REMOVE = """
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[2], ARGV[2])) do
  if member == ARGV[1] then return redis.call('ZREM', KEYS[1], ARGV[1]) end
end
return 0
"""


class Reaper:
    """Looks for leases past their deadline and finalizes their runs."""

    def __init__(self, link: Link, prefix: str) -> None:
        self._link = link
        self._prefix = prefix
        self._claim = new_claim()
        self._postponed = Postponed()
        self._resumable = Postponed()  # by member and deadline: each attempt has a wait of its own
        self._offsets: dict[int, int] = {}  # by partition: members that the last look left
        self._server: object = None
        self._has_checked_server = False
        self._steady_since = time.monotonic()

    async def run(self, partitions: int, stop: asyncio.Event) -> None:
        """Look every second until `stop`."""
        while not stop.is_set():
            try:
                await self._sweep(partitions)
            except TROUBLE as error:
                self._link.report_refusal("look for dead runs", error)
                self._steady_since = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP):
                    await stop.wait()

    async def _is_steady(self) -> bool:
        """Return whether the same server has answered for a lease's time: after an outage all leases look expired."""
        info = await self._link.call("INFO", "server")
        self._has_checked_server = True
        server = info.get("run_id") if isinstance(info, dict) else None
        if server != self._server or self._link.steady_since > self._steady_since:
            self._server = server
            self._steady_since = max(self._steady_since, self._link.steady_since, time.monotonic())
        meta = await read_meta(self._link, self._prefix)
        return meta is not None and time.monotonic() - self._steady_since > meta.lease_ttl

    async def _sweep(self, partitions: int) -> None:
        """Finalize the runs that are past their deadline. If there are none, this takes one command."""
        numbers = range(partitions)
        offsets = {keys.leases(self._prefix, n): self._offsets.get(n, 0) for n in numbers}
        due = await self._link.call_each(_READ_DUE, offsets)
        must_check = not self._has_checked_server or self._link.steady_since > self._steady_since
        if not (must_check or any(due.values())) or not await self._is_steady():
            return
        for n, (key, members) in zip(numbers, due.items(), strict=True):
            if isinstance(members, ResponseError):
                self._link.report_refusal(f"read {key}", members)
            else:
                await self._sweep_partition(n, members, offsets[key])

    async def _sweep_partition(self, n: int, due: Sequence[bytes], offset: int) -> None:
        left = 0
        members = list(zip(due[::2], due[1::2], strict=True))
        for member, deadline in members:
            left += not await self._finalize_contained(n, member, deadline)
        # The next look goes on after those that stay, so that they never hide the others.
        self._offsets[n] = offset + left if len(members) == _AT_ONCE else 0

    async def _finalize_contained(self, n: int, member: bytes, deadline: bytes) -> bool:
        """Finalize one run, and contain whatever is wrong with it; returns whether its member is removed."""
        leases = keys.leases(self._prefix, n)
        try:
            session, run_id = keys.parse_lease_member(self._prefix, member.decode())
        except ValueError:  # not one of ours
            await self._link.call("ZREM", leases, member)
            return True
        if not self._postponed.is_due(member):
            return False
        try:
            if not await self._finalize(n, session, run_id, _Death(member, deadline)):
                return False
        except TROUBLE as error:
            if not isinstance(error, ResponseError):
                raise  # Redis can't be reached: that concerns all runs
            self._postpone(member, run_id, error)
            return False
        except Exception as error:
            self._postpone(member, run_id, error)
            return False
        self._postponed.discard(member)
        await self._link.call("EVAL", REMOVE, 1, leases, member, deadline)
        return True

    def _postpone(self, member: bytes, run_id: str, error: Exception) -> None:
        wait = self._postponed.add(member)
        # Ids of a session are for operators' logs, never for metrics.
        logger.error(
            "run %s can't be finalized (%s), trying again in %.0f s",
            run_id, type(error).__name__, wait, exc_info=error, extra={"run_id": run_id},
        )  # fmt: skip

    async def _finalize(self, n: int, session: keys.SessionKeys, run_id: str, death: _Death) -> bool:
        """Finalize a run past its deadline; returns whether its member may be removed."""
        held = await self._link.call("GET", session.live)
        value = None if held is None else parse_live(held)
        if value is not None and not (value.is_gap_mark and value.run_id == run_id):
            return await self._finalize_replaced(n, session, run_id, value)
        # Before the claim, which would keep a successor out.
        if not self._resumable.is_due(death.key):
            return False
        run = await self._read_run(session, run_id, deadline_ms=death.deadline_ms)
        if (seconds := death.wait(run, self._link.now_ms())) > 0:
            self._resumable.hold(death.key, seconds)
            return False
        self._resumable.discard(death.key)
        if value is not None:
            return await self._finalize_cancelled(n, session, run_id, run, value)
        if not await self._link.call("EVAL", CLAIM.source, 1, session.live, self._claim, CLAIM_MS):
            return False
        try:
            run = await self._read_run(session, run_id, deadline_ms=death.deadline_ms)
            if death.wait(run, self._link.now_ms()) > 0:
                return False  # a successor has had it meanwhile
            missing = await self._find_missing(n, session, run_id, run)
            if missing.end is not None and not await self._end_claimed(session, run, missing):
                return False  # it has written meanwhile: it lives
            await self._queue_facts(n, run_id, missing)
            await self._link.call("ZREM", session.index, session.session)
            return True
        finally:
            await self._link.call("EVAL", RELEASE.source, 1, session.live, self._claim)

    async def _finalize_cancelled(
        self, n: int, session: keys.SessionKeys, run_id: str, run: RecordedRun, mark: LeaseValue
    ) -> bool:
        """Finalize a run that was cancelled while no process had it.

        The mark stays until the run has its `end`, so that a cancel is never forgotten. It keeps out all but a
        successor, and of a successor and this one only the first to append after the stream's last entry does.
        """
        missing = await self._find_missing(n, session, run_id, run, cancel_ms=mark.mark_ms)
        if missing.end is not None and not await self._end_stream(session, run, missing):
            return False
        await self._queue_facts(n, run_id, missing)
        await self._link.call("ZREM", session.index, session.session)
        await self._link.call("EVAL", RELEASE.source, 1, session.live, gap_holder(run_id))
        return True

    async def _finalize_replaced(self, n: int, session: keys.SessionKeys, run_id: str, value: LeaseValue) -> bool:
        """Queue the facts of a run whose session another run holds; returns whether that is done."""
        if value.run_id == run_id or not value.is_anothers:
            return False  # alive, its deadline is only a hint; or another replica is at it; or the value is unreadable
        run = await self._read_run(session, run_id)
        if run.begin is not None and run.end is None:
            return False  # the other has not begun yet, and may never begin: then this stream needs an `end`
        await self._queue_facts(n, run_id, await self._find_missing(n, session, run_id, run))
        return True

    async def _end_claimed(self, session: keys.SessionKeys, run: RecordedRun, missing: Finalization) -> bool:
        """Append `error` and `end`; returns False where the claim is lost or the stream has changed."""
        held = await self._link.call("EVAL", RENEW.source, 1, session.live, self._claim, CLAIM_MS)
        if held != self._claim.encode():
            return False  # reading took too long
        return await self._end_stream(session, run, missing)

    async def _end_stream(self, session: keys.SessionKeys, run: RecordedRun, missing: Finalization) -> bool:
        """Append `error` and `end`; returns False where the stream has changed."""
        return bool(
            await self._link.call(
                "EVAL",
                FINALIZE.source,
                1,
                session.stream,
                run.last_id,
                orjson.dumps(missing.error),
                orjson.dumps(missing.end),
                int(run.retention),
                session.wake_channel,
            )
        )

    async def _queue_facts(self, n: int, run_id: str, missing: Finalization) -> None:
        if not missing.facts:
            return
        queue = keys.queue(self._prefix, n)
        for fact in missing.facts:
            await self._link.call("XADD", queue, "*", FIELD, encode(fact))
        await self._link.call("EXPIRE", queue, keys.QUEUE_TTL)
        logger.warning("run %s was finalized as %s", run_id, missing.outcome, extra={"run_id": run_id})

    async def _read_run(self, session: keys.SessionKeys, run_id: str, *, deadline_ms: float = math.inf) -> RecordedRun:
        entries: list[StreamEntry] = []
        cursor = "-"
        while True:
            found = await self._link.call("XRANGE", session.stream, cursor, "+", "COUNT", _PAGE)
            entries += (StreamEntry.of(entry_id, fields) for entry_id, fields in found)
            if len(found) < _PAGE:
                return RecordedRun.of(run_id, entries, deadline_ms=deadline_ms)
            cursor = f"({found[-1][0].decode()}"

    async def _find_missing(
        self, n: int, session: keys.SessionKeys, run_id: str, run: RecordedRun, *, cancel_ms: int | None = None
    ) -> Finalization:
        """Compare the stream with the facts of the run and of its sub-agents that are queued."""
        queued = await read_queued_facts(self._link.call, keys.queue(self._prefix, n), run_id, run)
        return finalize_run(session, run_id, run, queued, cancel_ms=cancel_ms)


@dataclass(frozen=True, slots=True)
class _Death:
    """A deadline that has passed."""

    member: bytes
    deadline: bytes  # ms of the server's clock

    @property
    def key(self) -> bytes:
        return self.member + b" " + self.deadline

    @property
    def deadline_ms(self) -> float:
        return float(self.deadline)

    def wait(self, run: RecordedRun, now_ms: int) -> float:
        """Return for how many seconds from now another process may resume the run."""
        begin = run.begin
        if begin is None or begin.recover is None or run.end is not None or run.is_exhausted:
            return 0.0
        ends_ms = window_end_ms(begin.recover, last_entry_ms=run.last_ns / 1e6, deadline_ms=self.deadline_ms)
        return (ends_ms - now_ms) / 1_000
