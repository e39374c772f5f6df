"""The scope queues' producer: appends facts, at least once, without ever making a run wait for them."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from ..redis import keys
from ..redis.bus import Bus, Script
from ..redis.entry_id import parse_id
from ..redis.keys import SessionKeys
from ..redis.redis_py import Reply
from ..redis.retry import Backoff
from ..redis.supervisor import Supervisor
from .reader import QueuePages
from .schema import FIELD, Fact, ProcessState, encode

logger = logging.getLogger("agx")

FLUSH_INTERVAL = 0.05  # seconds; facts are for dashboards, and cost less together
BATCH = 200  # facts a partition
BUFFER = 20_000  # facts that a loop holds during an outage; beyond, the oldest are dropped
RETAINED_BATCHES = 1_000  # a partition; the bound of what can be queued again
_RETRY_FIRST, _RETRY_LAST = 0.05, 2.0
_UNCONFIRMED = 0.25  # seconds between two checks whether the ownership of a run is confirmed

_ENQUEUE = Script(f"""
local id
for i = 3, #ARGV do id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', '{FIELD}', ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return id
""")

# Whether an entry is there, or was there and has been trimmed.
_IS_THERE = Script("""
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) > 0 then return 1 end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local before = redis.call('XREVRANGE', KEYS[1], '(' .. ARGV[1], '-', 'COUNT', 1)[1]
if first and not before then return 1 end
return 0
""")


class Ownership(Protocol):
    """Whether this process may still emit a run's facts (`agx.runs.state`)."""

    @property
    def confirmed(self) -> bool:
        """Nobody else can have finished the run by now. Until then its facts wait."""
        ...

    @property
    def suppressed(self) -> bool:
        """Another process emitted how the run ended. Its facts are dropped."""
        ...


@dataclass(slots=True)
class _Queued:
    tenant: str
    data: bytes
    ownership: Ownership | None
    acknowledged: asyncio.Future[None] | None


@dataclass(slots=True)
class _Acknowledged:
    """A batch that the server acknowledged."""

    at: float
    last_id: str
    batch: list[_Queued]


class Queues:
    """Appends facts to the partition of their scope. A fact may be queued twice after trouble; its id counts once."""

    def __init__(self, bus: Bus, supervisor: Supervisor, prefix: str, *, max_length: int, keep: float) -> None:
        self._bus = bus
        self._supervisor = supervisor
        self._prefix = prefix
        self._max_length = max_length
        self._keep = keep  # seconds for which acknowledged facts are retained, in case a failover loses them
        self._retained: dict[int, deque[_Acknowledged]] = {}
        self.partitions: int | None = None  # known from `meta` before the first run
        self.dropped = 0
        self._pending: deque[_Queued] = deque()
        self._inflight = 0
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._backoff = Backoff(_RETRY_FIRST, _RETRY_LAST)

    def put(self, fact: Fact, ownership: Ownership | None = None) -> None:
        """Add a fact; synchronous."""
        self._queue(fact, ownership, None)
        self._schedule(FLUSH_INTERVAL)

    def put_acknowledged(self, fact: Fact, ownership: Ownership | None = None) -> asyncio.Future[None]:
        """Add a fact; the future is done when the server has it, or it was dropped."""
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue(fact, ownership, acknowledged)
        self._schedule(0.0)
        return acknowledged

    def _queue(self, fact: Fact, ownership: Ownership | None, acknowledged: asyncio.Future[None] | None) -> None:
        if len(self._pending) >= BUFFER:
            self._settle(self._pending.popleft())
            self.dropped += 1
            if self.dropped == 1:
                logger.error("agx: the buffer of facts is full (%d), the oldest are lost to the metrics", BUFFER)
        tenant = fact.service.name if isinstance(fact, ProcessState) else fact.scope
        self._pending.append(_Queued(tenant, encode(fact), ownership, acknowledged))

    @staticmethod
    def _settle(queued: _Queued) -> None:
        if queued.acknowledged is not None and not queued.acknowledged.done():
            queued.acknowledged.set_result(None)

    async def has_end(self, session: SessionKeys, run_id: str, since_ms: int) -> bool:
        """Return whether the fact of a run's end stands in its queue, appended at or after a server time."""
        fact_id = f"{run_id}:end"
        fact_key = f"{session.scope}:{session.user}:{session.session}:{fact_id}"
        queue, needle = keys.queue(self._prefix, keys.partition(session.scope, self.partitions or 1)), fact_id.encode()
        async for page in QueuePages(self._bus.execute, queue, start=str(max(0, since_ms))):
            if any(needle in entry.payload and entry.fact_key == fact_key for entry in page):
                return True
        return False

    @property
    def has_pending(self) -> bool:
        """Whether a fact is not acknowledged yet."""
        return bool(self._pending or self._inflight)

    async def drain(self) -> None:
        """Wait until every fact added so far is acknowledged."""
        while self.has_pending:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            self._schedule(0.0)
            await waiter

    def _schedule(self, wait: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if wait > 0 or self._backoff.is_waiting:
                return
            self._timer.cancel()
        self._timer = loop.call_later(wait, self._on_timer) if wait > 0 else loop.call_soon(self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if not self._supervisor.call(self._flush, name="agx-queues") and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_RETRY_LAST, self._on_timer)

    def _flush(self) -> None:
        # One round trip at a time: facts of a run stay in their order.
        if self._inflight or not self._pending:
            return
        if self.partitions is None:
            self._timer = asyncio.get_running_loop().call_later(_RETRY_LAST, self._on_timer)
            return
        batches: dict[int, list[_Queued]] = {}
        for queued in self._take(BATCH * self.partitions):
            batches.setdefault(keys.partition(queued.tenant, self.partitions), []).append(queued)
        if not batches:
            self._go_on(_UNCONFIRMED)
            return
        length = max(1, self._max_length // self.partitions)
        self._inflight = len(batches)
        for n, batch in batches.items():
            sent = self._bus.run(
                _ENQUEUE, keys.queue(self._prefix, n), length, keys.QUEUE_TTL, *(queued.data for queued in batch)
            )
            sent.add_done_callback(functools.partial(self._on_reply, n, batch))

    def _take(self, most: int) -> list[_Queued]:
        """Take what may be sent now; facts of a run that another process has finished are dropped."""
        taken: list[_Queued] = []
        waiting: list[_Queued] = []
        while self._pending and len(taken) < most:
            queued = self._pending.popleft()
            ownership = queued.ownership
            if ownership is not None and ownership.suppressed:
                self._settle(queued)
            else:
                (taken if ownership is None or ownership.confirmed else waiting).append(queued)
        self._pending.extendleft(reversed(waiting))
        return taken

    def _on_reply(self, n: int, batch: list[_Queued], reply: asyncio.Future[Reply]) -> None:
        self._inflight -= 1
        error = reply.exception()
        if error is None:
            self._backoff.reset()
            for queued in batch:
                self._settle(queued)
            self._retained.setdefault(n, deque()).append(
                _Acknowledged(time.monotonic(), reply.result().decode(), batch)
            )
            self._expire(n)
        else:
            # Of whatever kind: a fact is sent again until the server has it.
            self._pending.extendleft(reversed(batch))
            if not asyncio.get_running_loop().is_closed() and self._inflight == 0:
                self._timer = asyncio.get_running_loop().call_later(self._backoff.next(), self._on_timer)
            return
        if not self._inflight:
            self._go_on(0.0)

    def _go_on(self, wait: float) -> None:
        """Nothing is in flight: send what is left, or wake those that wait for the end."""
        if self._pending:
            if self._timer is None:
                self._schedule(wait)
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _expire(self, n: int) -> None:
        retained, oldest = self._retained[n], time.monotonic() - self._keep
        while retained and (retained[0].at < oldest or len(retained) > RETAINED_BATCHES):
            retained.popleft()

    def check_all(self) -> None:
        """Check, after a reconnection, whether the acknowledged facts are still there."""
        for n in self._retained:
            self._expire(n)
            if self._retained[n]:
                last_id = self._retained[n][-1].last_id
                there = self._bus.run(_IS_THERE, keys.queue(self._prefix, n), last_id)
                there.add_done_callback(functools.partial(self._on_looked, n, last_id))

    def _on_looked(self, n: int, last_id: str, there: asyncio.Future[Reply]) -> None:
        if there.exception() is not None or there.result():
            return  # after a broken connection it is checked again
        lost = [batch for batch in self._retained[n] if parse_id(batch.last_id) <= parse_id(last_id)]
        if not lost:
            return
        # Any of them may be lost; a fact that is queued twice counts once.
        facts = [queued for batch in lost for queued in batch.batch]
        logger.warning("agx: a failover lost facts of the last %.0f s, which are queued again", self._keep)
        for _ in lost:
            self._retained[n].popleft()
        self._pending.extendleft(reversed(facts))
        self._schedule(0.0)

    def close(self) -> None:
        """Stop the timer; what has not been sent is lost with the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
