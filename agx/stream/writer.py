"""The writer: appends a session's events, in order, without gap and without repeat (contract, section 4, append rule).

`SessionWriter.put()` is synchronous and never waits: events collect in memory and leave together, one batch per session
in flight. Deltas of one part that wait for the same batch are merged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ResponseError

from ..facts.schema import StreamTotals
from ..redis import keys
from ..redis.bus import CONNECTION_ERRORS
from ..redis.clock import ServerClock
from ..redis.entry_id import format_id, parse_id
from ..redis.redis_py import Reply
from ..redis.retry import COMMAND_TIMEOUT, Backoff, retry
from .append_scripts import BEGIN
from .entry import StreamEntry
from .events import Body, Part, UserBody, encode_body
from .group_commit import GroupCommit
from .stream_tail import Tail

logger = logging.getLogger("agx")

BATCH = 256  # entries
_RETRY_FIRST, _RETRY_LAST = 0.05, 1.0
_PREVIOUS_END = 5.0  # seconds a run waits for the `end` of the one before, which may still be saving
_PREVIOUS_POLL = 0.05


@dataclass(slots=True)
class PendingEntry:
    """An event that waits to be sent: a body, or the deltas of one part, which collect in `pieces` until then."""

    type: str
    origin: str
    body: Body | None
    part: Part | None = None
    pieces: list[str] = field(default_factory=list)
    size: int = 0  # characters in `pieces`

    def take_body(self) -> Body:
        """Return the body in its final form, the caller's to change."""
        if self.part is not None:
            return self.part.delta("".join(self.pieces))
        return UserBody(self.body) if isinstance(self.body, UserBody) else dict(self.body or {})


class SessionWriter:
    """Appends the events of one run to its session's stream.

    Args:
        retention: seconds that the stream is kept after its `end`.
        on_end: called with the server time in ms of each `end` that the server has acknowledged.
        on_fenced: called when the stream belongs to another run, or was ended by a sidecar.
    """

    def __init__(
        self,
        writer: GroupCommit,
        session: keys.SessionKeys,
        clock: ServerClock,
        *,
        retention: float,
        on_end: Callable[[int], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._keys = session
        self.tail = Tail(
            writer.bus,
            session,
            clock,
            keep=writer.keep,
            max_length=writer.max_length,
            retention=retention,
            on_end=on_end,
        )
        self._stopped = False  # nothing is written any more: the stream is another run's, or closed
        self.last_put = time.monotonic()
        self.proved = float("-inf")  # monotonic: until then at least the stream was ours
        self._on_fenced = on_fenced
        self._most_merged = writer.max_body // 8  # characters: an escaped one takes six bytes, and nothing may be cut
        self._ending = False
        self._pending: deque[PendingEntry] = deque()
        self._sent: list[StreamEntry] = []  # the batch in flight
        self._sent_at_ns = 0
        self._asked = 0.0  # monotonic, when Redis was last asked for the stream
        self._seq = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._backoff = Backoff(_RETRY_FIRST, _RETRY_LAST)
        self._retry: asyncio.TimerHandle | None = None
        self._resolving: asyncio.Task[None] | None = None
        self._events = self._bytes = self._retries = self._failures = 0

    @property
    def buffered(self) -> int:
        return len(self._pending) + len(self._sent)

    @property
    def totals(self) -> StreamTotals:
        return StreamTotals(self._events, self._bytes, self._retries, self._failures)

    async def begin(self, body: dict[str, Any], *, origin: str) -> None:
        """Restart the stream with this run's `begin`, as soon as the run before has its `end`, at most 5 s.

        Raises:
            RedisError, OSError: not appended as far as is known.
        """
        waited_since = time.monotonic()
        trouble_since: float | None = None
        entry: StreamEntry | None = None
        while True:
            top = await retry(lambda: self._writer.bus.execute("XREVRANGE", self._keys.stream, "+", "-", "COUNT", 1))
            if entry is not None and top and parse_id(top[0][0].decode()) == entry.id:
                break  # only the reply was lost
            if top and top[0][1].get(b"type") != b"end" and time.monotonic() - waited_since < _PREVIOUS_END:
                await asyncio.sleep(_PREVIOUS_POLL)
                continue
            if top:
                self.tail.note(parse_id(top[0][0].decode()))
            entry = self._stamp(PendingEntry("begin", origin, body), seq=0)
            try:
                await self._issue_begin(entry)
                break
            except ResponseError as error:
                if "equal or smaller" not in str(error):
                    raise
            except CONNECTION_ERRORS:
                trouble_since = trouble_since or self._asked
                if time.monotonic() - trouble_since > COMMAND_TIMEOUT:
                    raise
        self._take_begun(entry)

    async def _issue_begin(self, entry: StreamEntry) -> None:
        self._asked = time.monotonic()
        reply = self._writer.bus.run(
            BEGIN,
            self._keys.stream,
            format_id(entry.id),
            entry.origin,
            entry.raw_body,
            keys.STREAM_TTL,
            self._keys.wake_channel,
        )
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                await asyncio.shield(reply)
        except asyncio.CancelledError:
            # It is on its way, and who sees a `begin` has to see an `end`.
            await asyncio.wait({reply}, timeout=COMMAND_TIMEOUT)
            if reply.done() and reply.exception() is None:
                self._take_begun(entry)
            raise

    def _take_begun(self, entry: StreamEntry) -> None:
        self.proved = self._asked
        self.tail.begin(entry)
        self._writer.open(self)

    @property
    def begun(self) -> bool:
        """Whether the `begin` is appended, as far as is known."""
        return self.tail.kept.begin is not None

    def put(self, type: str, origin: str, body: dict[str, Any], *, urgent: bool = False) -> None:
        """Hand an event over; synchronous, and nothing is awaited on the token path."""
        self.last_put = time.monotonic()
        if self._stopped:
            return
        self._ending = self._ending or type == "end"
        self._pending.append(PendingEntry(type, origin, body))
        self._writer.schedule(self, urgent=urgent)

    def put_delta(self, origin: str, part: Part, text: str) -> None:
        """Hand a delta over; while it waits, further deltas of the same part join it."""
        self.last_put = time.monotonic()
        if self._stopped:
            return
        if self._pending and (last := self._pending[-1]).part is part and last.size < self._most_merged:
            last.pieces.append(text)
            last.size += len(text)
            return
        self._pending.append(PendingEntry("event", origin, None, part, [text], len(text)))
        self._writer.schedule(self, urgent=False)

    async def drain(self) -> None:
        """Wait until everything handed over is acknowledged, or the run is fenced."""
        while (self._pending or self._sent) and not self._stopped:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def close(self) -> None:
        """Leave the session; called when its `end` is acknowledged or it is fenced. What is kept is watched on."""
        self._writer.close_session(self, 0.0 if self._stopped else self._writer.keep)

    def forget(self) -> None:
        """Let go of what is kept: the stream is another run's, or nobody's."""
        self._stopped = True
        if self._retry is not None:
            self._retry.cancel()
        self._release_waiters()

    @property
    def stream(self) -> str:
        return self._keys.stream

    def refresh(self) -> None:
        """Put the stream's expiry off again, unless the `end` has set the last one."""
        if not self._ending:
            self._writer.bus.execute("EXPIRE", self._keys.stream, keys.STREAM_TTL)

    def check(self) -> None:
        """Look whether what was acknowledged lately is still there."""
        # A batch in flight looks for itself.
        if not (self._stopped or self._sent or self._resolving is not None) and self.tail.kept:
            self._reconcile()

    def send(self) -> int:
        """Send the next batch, unless one is in flight; returns how many deltas have merged with others in it."""
        if self._sent or self._stopped or not self._pending or self._resolving is not None:
            return 0
        merged = 0
        while self._pending and len(self._sent) < BATCH:
            entry = self._pending.popleft()
            merged += max(0, len(entry.pieces) - 1)
            self._sent.append(self._stamp(entry))
        self._sent_at_ns = time.perf_counter_ns()
        self._transmit()
        return merged

    def _stamp(self, entry: PendingEntry, *, seq: int | None = None) -> StreamEntry:
        """Give an entry its id, its `seq` and its bytes, all final."""
        if seq is not None:
            self._seq = seq
        own_seq: bytes | None = None
        if isinstance(entry.body, UserBody) and entry.body.is_ambiguous(entry.origin):
            plain: Body = entry.body
            own_seq = b"%d" % self._seq
        else:
            plain = entry.take_body()
            plain["seq"] = self._seq
        body = encode_body(plain, self._writer.max_body)
        sent = StreamEntry(self.tail.next_id(), entry.type, entry.origin, body, own_seq)
        self._seq += 1
        self._events += 1
        self._bytes += len(body)
        return sent

    def _transmit(self) -> None:
        self._asked = time.monotonic()
        self.tail.append(self._sent).add_done_callback(self._on_reply)

    def _on_reply(self, reply: asyncio.Future[Reply]) -> None:
        error = reply.exception()
        if error is None and reply.result() == b"ok":
            self._acknowledge()
        elif error is None:
            self._reconcile()
        else:
            self._retry_later(error)  # of whatever kind: an event is sent again until the server has it

    def _acknowledge(self) -> None:
        self._writer.stats.observe(time.perf_counter_ns() - self._sent_at_ns)
        self.tail.acknowledge(self._sent)
        self._sent = []
        self._go_on(urgent=False)

    def _go_on(self, *, urgent: bool) -> None:
        """Redis has answered, and the stream is ours: send what waits."""
        self.proved = self._asked
        self._writer.note_recovery(self)
        self._backoff.reset()
        if self._sent:
            self._transmit()
        elif self._pending:
            self._writer.schedule(self, urgent=urgent)
        else:
            self._release_waiters()

    def _retry_later(self, error: BaseException) -> None:
        if self._sent:
            self._retries += 1
            self._failures += not self._backoff.is_waiting and not isinstance(error, CONNECTION_ERRORS)
        self._writer.note_trouble(self, error)
        loop = asyncio.get_running_loop()
        if not loop.is_closed():
            self._retry = loop.call_later(self._backoff.next(), self._try_again)

    def retry_now(self) -> None:
        """Try again without waiting any longer, where a retry waits: another session has got through."""
        if self._retry is not None:
            self._retry.cancel()
            self._try_again()

    def _try_again(self) -> None:
        self._retry = None
        if self._sent:
            self._transmit()
        elif self.tail.kept and self._resolving is None:
            self._reconcile()
        else:
            self._writer.schedule(self, urgent=True)  # what came meanwhile

    # --- after a refusal, or a reconnection ---

    def _reconcile(self) -> None:
        self._resolving = asyncio.get_running_loop().create_task(self._compare(), name="agx-compare")

    async def _compare(self) -> None:
        """Compare the stream with what we sent, and go on from there, or find ourselves fenced."""
        self._asked = time.monotonic()
        try:
            ours = await self.tail.compare(self._sent)
        except Exception as error:
            self._resolving = None
            if not self._stopped:
                self._retry_later(error)
            return
        if not ours:
            self._fence()
            return
        self._resolving = None
        self._go_on(urgent=True)

    def _fence(self) -> None:
        self._stopped = True
        self._pending.clear()
        self._sent = []
        self._writer.note_recovery(self)
        self._release_waiters()
        self._on_fenced()

    def _release_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
