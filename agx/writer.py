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

from redis.exceptions import RedisError, ResponseError

from . import keys
from .clock import ServerClock
from .commit import GroupCommit
from .connections import CONNECTION_ERRORS, Reply, Script
from .events import Body, Part, encode_body
from .facts import StreamTotals

logger = logging.getLogger("agx")

BATCH = 256  # entries
COMMAND_TIMEOUT = 2.0  # seconds a start gives a command
_RETRY_FIRST, _RETRY_LAST = 0.05, 1.0
_PREVIOUS_END = 5.0  # seconds a run waits for the `end` of the one before, which may still be saving
_PREVIOUS_POLL = 0.05

# One batch, all or (where an id is refused) none of it. Whoever began a run or wrote an `end` behind our last entry
# ended ours; other entries behind it are somebody's `add()`.
_APPEND = Script("""
local key = KEYS[1]
for _, entry in ipairs(redis.call('XRANGE', key, '(' .. ARGV[1], '+')) do
  local kind = entry[2][2]
  if kind == 'begin' or kind == 'end' then return 'refused' end
end
local top = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
if top then
  local ms, n = string.match(top[1], '(%d+)-(%d+)')
  local our_ms, our_n = string.match(ARGV[5], '(%d+)-(%d+)')
  ms, n, our_ms, our_n = tonumber(ms), tonumber(n), tonumber(our_ms), tonumber(our_n)
  if our_ms < ms or (our_ms == ms and our_n <= n) then return 'refused' end
end
for i = 5, #ARGV, 4 do
  redis.call('XADD', key, 'MAXLEN', '~', ARGV[3], ARGV[i], 'type', ARGV[i+1], 'origin', ARGV[i+2], 'body', ARGV[i+3])
end
redis.call('EXPIRE', key, ARGV[4])
redis.call('PUBLISH', ARGV[2], ARGV[#ARGV - 3])
return 'ok'
""")

# The restart of a session's stream: one command that drops the run before and refuses its late entries.
_BEGIN = Script("""
redis.call('XADD', KEYS[1], 'MAXLEN', '=', 1, ARGV[1], 'type', 'begin', 'origin', ARGV[2], 'body', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[5], ARGV[1])
return 'ok'
""")


@dataclass(slots=True)
class Entry:
    """An event that waits to be sent: a body, or the deltas of one part, which collect in `pieces` until then."""

    type: str
    origin: str
    body: Body | None
    part: Part | None = None
    pieces: list[str] = field(default_factory=list)

    def take_body(self) -> Body:
        """Return the body in its final form, the caller's to change."""
        if self.part is not None:
            return self.part.delta("".join(self.pieces))
        return dict(self.body or {})


@dataclass(slots=True)
class _Sent:
    """An entry as it was first sent; never changed afterwards."""

    id: str
    type: str
    origin: str
    body: bytes
    seq: int


class SessionWriter:
    """Appends the events of one run to its session's stream."""

    def __init__(
        self,
        writer: GroupCommit,
        session: keys.SessionKeys,
        clock: ServerClock,
        *,
        retention: float,
        on_fenced: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._keys = session
        self._clock = clock
        self.retention = retention  # seconds the stream is kept after its `end`
        self.fenced = False  # another run took the stream over; nothing is written any more
        self.end_ms: int | None = None  # server time of our `end`
        self.last_put = time.monotonic()
        self._on_fenced = on_fenced
        self._pending: deque[Entry] = deque()
        self._sent: list[_Sent] = []  # the batch in flight
        self._sent_at_ns = 0
        self._seq = 0
        self._last = (0, 0)  # id of the last entry given
        self._acked = "0-0"
        self._waiters: list[asyncio.Future[None]] = []
        self._backoff = _RETRY_FIRST
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
            RedisError, OSError, TimeoutError: not appended as far as is known.
        """
        waited_since = time.monotonic()
        while True:
            top = await asyncio.wait_for(
                self._writer.bus.execute("XREVRANGE", self._keys.stream, "+", "-", "COUNT", 1), COMMAND_TIMEOUT
            )
            if not top or top[0][1].get(b"type") == b"end" or time.monotonic() - waited_since > _PREVIOUS_END:
                if top:
                    self._last = max(self._last, _parse(top[0][0].decode()))
                entry = self._stamp(Entry("begin", origin, body), seq=0)
                args = (entry.id, origin, entry.body, keys.STREAM_TTL, self._keys.wake_channel)
                try:
                    await asyncio.wait_for(self._writer.bus.run(_BEGIN, self._keys.stream, *args), COMMAND_TIMEOUT)
                except ResponseError as error:
                    if "equal or smaller" not in str(error):
                        raise
                else:
                    self._acked = entry.id
                    self._writer.sessions.add(self)
                    return
            await asyncio.sleep(_PREVIOUS_POLL)

    def put(self, type: str, origin: str, body: dict[str, Any], *, urgent: bool = False) -> None:
        """Hand an event over; synchronous, and nothing is awaited on the token path."""
        self.last_put = time.monotonic()
        if self.fenced:
            return
        self._pending.append(Entry(type, origin, body))
        self._writer.schedule(self, urgent=urgent)

    def put_delta(self, origin: str, part: Part, text: str) -> None:
        """Hand a delta over; while it waits, further deltas of the same part join it."""
        self.last_put = time.monotonic()
        if self.fenced:
            return
        if self._pending and (last := self._pending[-1]).part is part:
            last.pieces.append(text)
            return
        self._pending.append(Entry("event", origin, None, part, [text]))
        self._writer.schedule(self, urgent=False)

    async def drain(self) -> None:
        """Wait until everything handed over is acknowledged, or the run is fenced."""
        while (self._pending or self._sent) and not self.fenced:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def close(self) -> None:
        """Forget the session; called when its `end` is acknowledged or it is fenced."""
        self._writer.sessions.discard(self)
        if self._retry is not None:
            self._retry.cancel()

    def send(self) -> None:
        """Send the next batch, unless one is in flight."""
        if self._sent or self.fenced or not self._pending or self._resolving is not None:
            return
        while self._pending and len(self._sent) < BATCH:
            self._sent.append(self._stamp(self._pending.popleft()))
        self._sent_at_ns = time.perf_counter_ns()
        self._transmit()

    def _stamp(self, entry: Entry, *, seq: int | None = None) -> _Sent:
        """Give an entry its id, its `seq` and its bytes, all final."""
        if seq is not None:
            self._seq = seq
        plain = entry.take_body()
        plain["seq"] = self._seq
        body = encode_body(plain, self._writer.max_body)
        sent = _Sent(self._next_id(), entry.type, entry.origin, body, self._seq)
        self._seq += 1
        self._events += 1
        self._bytes += len(body)
        return sent

    def _transmit(self) -> None:
        self._retry = None
        args: list[bytes | str | int] = [
            self._acked,
            self._keys.wake_channel,
            self._writer.max_length,
            max(1, int(self.retention)) if self._sent[-1].type == "end" else keys.STREAM_TTL,
        ]
        for entry in self._sent:
            args += (entry.id, entry.type, entry.origin, entry.body)
        self._writer.bus.run(_APPEND, self._keys.stream, *args).add_done_callback(self._on_reply)

    def _on_reply(self, reply: asyncio.Future[Reply]) -> None:
        error = reply.exception()
        if error is None and reply.result() == b"ok":
            self._acknowledge()
        elif error is None:
            self._resolving = asyncio.get_running_loop().create_task(self._resolve_refusal(), name="agx-refusal")
        elif isinstance(error, (RedisError, OSError)):
            self._retry_later(error)
        else:
            raise error

    def _acknowledge(self) -> None:
        self._writer.stats.observe(time.perf_counter_ns() - self._sent_at_ns)
        last = self._sent[-1]
        self._acked = last.id
        if last.type == "end":
            self.end_ms = _parse(last.id)[0]
        self._sent.clear()
        if self._backoff > _RETRY_FIRST:
            logger.warning("agx: Redis is back, the events of session %s are appended again", self._keys.session)
        self._backoff = _RETRY_FIRST
        if self._pending:
            self._writer.schedule(self, urgent=False)
        else:
            self._release_waiters()

    def _retry_later(self, error: BaseException) -> None:
        self._retries += 1
        if self._backoff == _RETRY_FIRST:
            self._failures += not isinstance(error, CONNECTION_ERRORS)
            logger.warning(
                "agx: Redis refuses or can't be reached (%s: %s); the run goes on, events of session %s wait in memory",
                type(error).__name__,
                error,
                self._keys.session,
            )
        loop = asyncio.get_running_loop()
        if not loop.is_closed():
            self._retry = loop.call_later(self._backoff, self._transmit)
        self._backoff = min(self._backoff * 2, _RETRY_LAST)

    async def _resolve_refusal(self) -> None:
        """Read what stands above our last acknowledged entry, and go on from there, or find ourselves fenced."""
        try:
            above = await self._writer.bus.execute("XRANGE", self._keys.stream, f"({self._acked}", "+")
        except (RedisError, OSError) as error:
            self._resolving = None
            self._retry_later(error)
            return
        self._resolving = None
        ours = {entry.id.encode(): entry for entry in self._sent}
        for entry_id, values in above:
            if (mine := ours.get(entry_id)) is not None and values.get(b"body") == mine.body:
                self._sent.remove(mine)
                self._acked = mine.id
                if mine.type == "end":
                    self.end_ms = _parse(mine.id)[0]
            elif values.get(b"type") in (b"begin", b"end"):
                self._fence()
                return
            else:
                self._last = max(self._last, _parse(entry_id.decode()))
                self._acked = entry_id.decode()
        if not self._sent:
            if self._pending:
                self._writer.schedule(self, urgent=True)
            else:
                self._release_waiters()
            return
        # Their ids were refused for good, so nothing of them can arrive late: new ids, the same bodies.
        for entry in self._sent:
            entry.id = self._next_id()
        self._transmit()

    def _next_id(self) -> str:
        ms, n = self._last
        now = self._clock.now_ms()
        self._last = (now, 0) if now > ms else (ms, n + 1)
        return f"{self._last[0]}-{self._last[1]}"

    def _fence(self) -> None:
        self.fenced = True
        self._pending.clear()
        self._sent.clear()
        self._release_waiters()
        self._on_fenced()

    def _release_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _parse(entry_id: str) -> tuple[int, int]:
    ms, _, n = entry_id.partition("-")
    return int(ms), int(n or 0)
