"""The writer: appends a session's events, in order, without gap and without repeat (contract, section 4, append rule).

`SessionWriter.put()` is synchronous and never waits: events collect in memory and leave together, one batch per session
in flight. Deltas of one part that wait for the same batch are merged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..facts.schema import StreamTotals
from ..redis import keys
from ..redis.bus import CONNECTION_ERRORS, Script
from ..redis.entry_id import StreamId, format_id
from ..redis.redis_py import Reply
from ..redis.retry import COMMAND_TIMEOUT, Backoff, reply_timeout, retry
from .append_scripts import BEGIN, RESUME
from .entry import StreamEntry, When, to_arguments
from .events import Part
from .pending import Pending, PendingEntry
from .stream_tail import StreamTail
from .write_side import WriteSide

BATCH = 256  # entries
_RETRY_FIRST, _RETRY_LAST = 0.05, 1.0
_PREVIOUS_END, _PREVIOUS_POLL = 5.0, 0.05  # seconds that a run waits for the previous `end`, and between two reads
_FIRST_LISTENER = 0.5  # seconds after `begin` for a first listener to come; until then the run counts as followed


@dataclass(slots=True)
class _Counts:
    """What the writer did, for the run's last fact."""

    events: int = 0
    retries: int = 0
    failures: int = 0


class SessionWriter:
    """Appends the events of one run to its session's stream.

    Args:
        retention: seconds that the stream is kept after its `end`.
        on_end: called with the server time in ms of each `end` that the server has acknowledged.
        on_fenced: called when the stream belongs to another run, or was ended by a sidecar.
    """

    def __init__(
        self,
        side: WriteSide,
        session: keys.SessionKeys,
        *,
        retention: float,
        on_end: Callable[[int], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self.tail = StreamTail(side, session, retention=retention, on_end=on_end)
        self.last_put = time.monotonic()
        self.proved = float("-inf")  # monotonic: until then at least the stream was ours
        self._side = side
        self._keys = session
        self.stream = session.stream
        self._on_fenced = on_fenced
        self._stopped = False  # nothing is written any more: the stream is another run's, or closed
        self._has_end = False
        self._is_followed = True  # as far as is known
        self._pending = Pending(side.settings.max_body)
        self._send_after_reply = False  # another batch must be sent after the one in flight
        self._batch: list[StreamEntry] = []  # in flight
        self._batch_sent_ns = 0
        self._begun = 0.0  # monotonic, when the `begin` was sent
        self._asked = 0.0  # monotonic, when Redis was last asked for the stream
        self._seq = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._backoff = Backoff(_RETRY_FIRST, _RETRY_LAST)
        self._retry: asyncio.TimerHandle | None = None
        self._comparing: asyncio.Task[None] | None = None
        self._counts = _Counts()

    @property
    def buffered(self) -> int:
        return len(self._pending.entries) + len(self._batch)

    @property
    def totals(self) -> StreamTotals:
        counts = self._counts
        return StreamTotals(counts.events, self.tail.written_bytes, counts.retries, counts.failures)

    async def begin(
        self,
        body: dict[str, Any],
        *,
        origin: str,
        last: Reply,
        ensure_lease: Callable[[bool], Awaitable[int]],
        checkpoint: bytes | None = None,
    ) -> None:
        """Restart the stream with this run's `begin`, as soon as the run before has its `end`, at most 5 s.

        Args:
            last: the stream's last entry, as read just now; read again only where it is not an `end`.
            ensure_lease: returns the server's time in ms until which the run may begin; raises if another run has the
                lease. Its argument is whether the last `begin` arrived too late. Called after the stream was read: the
                server appends only if the stream has not changed since, so a process that stalls replaces no later run.

        Raises:
            RedisError, OSError: not appended as far as is known.
        """
        waited_since = time.monotonic()
        trouble_since: float | None = None
        sent: dict[StreamId, StreamEntry] = {}
        reply: Reply = None
        while True:
            top = StreamEntry.of(*last[0]) if last else None
            # Of the same id may also be an entry that another process added in the same millisecond.
            if top is not None and (entry := sent.get(top.id)) is not None and entry.raw_body == top.raw_body:
                break  # only the reply was lost
            until_ms = await ensure_lease(reply == b"late")
            if top is not None and top.type != "end" and time.monotonic() - waited_since < _PREVIOUS_END:
                await asyncio.sleep(_PREVIOUS_POLL)
            else:
                self.tail.note((0, 0) if top is None else top.id)
                entry = self._stamp(PendingEntry("begin", origin, body, checkpoint=checkpoint), seq=0)
                sent[entry.id] = entry
                try:
                    after = format_id(top.id) if top else ""
                    if (reply := await self._append_first(BEGIN, entry, after, until_ms)) == b"ok":
                        break
                except CONNECTION_ERRORS as error:
                    trouble_since = trouble_since or self._asked  # not now: the process may have been stopped
                    if isinstance(error, TimeoutError) or self._asked - trouble_since > COMMAND_TIMEOUT:
                        raise
            last = await retry(lambda: self._side.bus.execute("XREVRANGE", self._keys.stream, "+", "-", "COUNT", 1))
        self._take_begun(entry)

    async def resume(self, body: dict[str, Any], *, origin: str, after: StreamId, seq: int) -> bool:
        """Go on with the run of another process; returns False where an entry stands after the one read last.

        Args:
            after: id of the entry read last.
            seq: number of this entry.

        Raises:
            RedisError, OSError: not appended as far as is known.
        """
        self.tail.note(after)
        entry = self._stamp(PendingEntry("resume", origin, body), seq=seq)
        if await retry(lambda: self._append_first(RESUME, entry, format_id(after))) != b"ok":
            return False
        self._take_begun(entry)
        return True

    async def _append_first(self, script: Script, entry: StreamEntry, *conditions: str | int) -> Reply:
        self._asked = time.monotonic()
        args = (self._keys.wake_channel, keys.STREAM_TTL, *conditions, format_id(entry.id), *to_arguments(entry))
        reply = self._side.bus.run(script, self._keys.stream, *args)
        try:
            async with reply_timeout():
                return await asyncio.shield(reply)
        except asyncio.CancelledError:
            # It may be appended, and a listener that gets a `begin` has to get an `end`.
            await asyncio.wait({reply}, timeout=COMMAND_TIMEOUT)
            if reply.done() and reply.exception() is None and reply.result() == b"ok":
                self._take_begun(entry)
            raise

    def _take_begun(self, entry: StreamEntry) -> None:
        self.proved = self._begun = self._asked
        self.tail.begin(entry)
        self._side.streams.open(self)

    @property
    def begun(self) -> bool:
        """Whether the `begin` is appended."""
        return self.tail.retained.begin is not None

    def put(
        self, type: str, origin: str, body: dict[str, Any], *, when: When = "soon", checkpoint: bytes | None = None
    ) -> None:
        """Add an event; synchronous: nothing on the token path waits."""
        self.last_put = time.monotonic()
        if self._stopped:
            return
        self._has_end = self._has_end or type == "end"
        self._pending.put(type, origin, body, checkpoint)
        self._side.commit.schedule(self, when)

    def put_delta(self, origin: str, part: Part, text: str, *, is_first: bool = False) -> None:
        """Add a delta; while it waits, further deltas of its part are merged with it. A run's first one is sent now."""
        self.last_put = time.monotonic()
        if not self._stopped and (self._pending.put_delta(origin, part, text) or is_first):
            self._side.commit.schedule(self, "now" if is_first else "soon" if self._is_followed else "later")

    async def drain(self) -> None:
        """Wait until everything added is acknowledged, or the run is fenced."""
        if self._pending.entries and not self._stopped:
            self._side.commit.schedule(self, "soon")
        while (self._pending.entries or self._batch) and not self._stopped:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def close(self) -> None:
        """End writing, after the `end` was acknowledged or the run was fenced; retained entries are still checked."""
        self._side.streams.close(self, retain=not self._stopped)

    def forget(self) -> None:
        """Stop writing: the stream belongs to another run, or nothing is retained any longer."""
        self._stopped = True
        self._cancel_retry()
        self._release_waiters()

    def refresh(self) -> None:
        """Set the stream's expiry anew, unless the `end` has set the final one."""
        if not self._has_end:
            self._side.bus.execute("EXPIRE", self._keys.stream, keys.STREAM_TTL)

    def check(self) -> None:
        """Compare the stream with the retained entries, in the background."""
        if self.tail.retained:
            self.check_owner()

    def check_owner(self) -> None:
        """Compare the stream also where nothing is retained any longer: it may be another run's, or ended."""
        if not (self._stopped or self._batch or self._comparing is not None):  # a batch may start one
            self._start_comparison()

    def send(self) -> int:
        """Send the next batch, unless one is in flight; returns how many deltas have merged with others in it."""
        entries, merged = self._pending.entries, 0
        self._send_after_reply = bool(entries)
        if self._batch or self._stopped or not entries or self._comparing is not None:
            return 0
        while entries and len(self._batch) < BATCH:
            entry = entries.popleft()
            merged += max(0, len(entry.pieces) - 1)
            self._batch.append(self._stamp(entry))
        self._send_after_reply = bool(entries)
        self._batch_sent_ns = time.perf_counter_ns()
        self._transmit()
        return merged

    def _stamp(self, entry: PendingEntry, *, seq: int | None = None) -> StreamEntry:
        self._seq = self._seq if seq is None else seq
        sent = entry.stamp(self.tail.next_id(), self._seq, self._side.settings.max_body)
        self._seq += 1
        self._counts.events += 1
        return sent

    def _transmit(self) -> None:
        self._cancel_retry()  # else it sends the same batch again
        self._asked = time.monotonic()
        self.tail.append(self._batch).add_done_callback(self._on_reply)

    def _on_reply(self, reply: asyncio.Future[Reply]) -> None:
        error = reply.exception()
        if error is None and isinstance(reply.result(), int):
            self._acknowledge(reply.result())
        elif error is None:
            self._start_comparison()
        else:
            self._retry_later(error)  # any error: an event is sent again until the server has it

    def _acknowledge(self, receivers: int) -> None:
        # A server of a cluster counts only its own subscribers.
        is_known = self._side.bus.delivers_messages and self._asked >= self._begun + _FIRST_LISTENER
        self._is_followed = receivers > 0 or not is_known
        self._side.commit.stats.observe(time.perf_counter_ns() - self._batch_sent_ns)
        self.tail.acknowledge(self._batch)
        self._batch = []
        self._go_on("soon")

    def _go_on(self, when: When) -> None:
        """Redis answered, and the stream is ours: send what waits."""
        self.proved = self._asked
        if self._backoff.is_waiting:
            self._side.streams.note_success(self)
            self._backoff.reset()
        if self._batch:
            self._transmit()
        elif self._send_after_reply:
            self._side.commit.schedule(self, when)
        elif not self._pending.entries:
            self._release_waiters()

    def _retry_later(self, error: BaseException) -> None:
        if self._batch:
            self._counts.retries += 1
            self._counts.failures += not self._backoff.is_waiting and not isinstance(error, CONNECTION_ERRORS)
        self._side.streams.note_failure(self, error)
        self._retry = asyncio.get_running_loop().call_later(self._backoff.next(), self._try_again)

    def retry_now(self) -> None:
        """Retry without further delay, where a retry waits: Redis answered another session."""
        if self._retry is not None:
            self._try_again()

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _try_again(self) -> None:
        self._cancel_retry()
        if self._batch:
            self._transmit()
        elif self.tail.retained and self._comparing is None:
            self._start_comparison()
        else:
            self._side.commit.schedule(self, "now")  # events that were added meanwhile

    # --- after a refusal or a reconnection

    def _start_comparison(self) -> None:
        self._cancel_retry()
        self._comparing = asyncio.get_running_loop().create_task(self._compare(), name="agx-compare")

    async def _compare(self) -> None:
        """Compare the stream with what was sent; go on from there, or stop if the run is fenced."""
        self._asked = time.monotonic()
        try:
            ours = await self.tail.compare(self._batch)
        except Exception as error:
            self._comparing = None
            if not self._stopped:
                self._retry_later(error)
            return
        if not ours:
            self._fence()
            return
        self._comparing = None
        self._go_on("now")

    def _fence(self) -> None:
        self._stopped = True
        self._pending.entries.clear()
        self._batch = []
        self._side.streams.note_success(self)
        self._release_waiters()
        self._on_fenced()

    def _release_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
