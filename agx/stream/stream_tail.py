"""The tail of a session's stream as its run left it: ids given, entries acknowledged, and how to get in step again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from redis.exceptions import ResponseError

from ..redis import keys
from ..redis.bus import Bus
from ..redis.clock import ServerClock
from ..redis.entry_id import StreamId, format_id, parse_id
from ..redis.redis_py import Reply
from .append_scripts import APPEND
from .entry import StreamEntry
from .retained import Found, Kept

logger = logging.getLogger("agx")


class Tail:
    """What one run knows of the end of its stream (contract, section 4, append rule)."""

    def __init__(
        self,
        bus: Bus,
        session: keys.SessionKeys,
        clock: ServerClock,
        *,
        keep: float,
        max_length: int,
        retention: float,
        on_end: Callable[[int], None],
    ) -> None:
        self.kept = Kept(keep)
        self.retention = retention  # seconds the stream is kept after its `end`
        self._on_end = on_end
        self._end_sent = float("inf")  # monotonic, when our `end` was first sent
        self._bus = bus
        self._session = session
        self._clock = clock
        self._max_length = max_length
        self._last: StreamId = (0, 0)  # id of the last entry given, or seen
        self._acked: StreamId = (0, 0)

    def next_id(self) -> StreamId:
        """Give an id that is above all given and seen before, and carries the server's time."""
        ms, n = self._last
        now = self._clock.now_ms()
        self._last = (now, 0) if now > ms else (ms, n + 1)
        return self._last

    def note(self, seen: StreamId) -> None:
        """Take note of an entry that stands in the stream: ids go on above it."""
        self._last = max(self._last, seen)

    def begin(self, entry: StreamEntry) -> None:
        """Our `begin` is acknowledged."""
        self.kept.begin = entry
        self.acknowledge([entry])

    def acknowledge(self, entries: list[StreamEntry]) -> None:
        """The server has these entries, in their order."""
        self.kept.add(entries)
        last = entries[-1]
        self._acked = last.id
        if last.type == "end":
            self._on_end(last.id[0])

    def append(self, entries: list[StreamEntry]) -> asyncio.Future[Reply]:
        """Issue a batch behind our last acknowledged entry: all of it is appended, or nothing."""
        if entries[-1].type == "end":
            self._end_sent = min(self._end_sent, time.monotonic())
        return self._issue(format_id(self._acked), entries)

    @property
    def _ttl_after_end(self) -> int:
        return max(1, int(self.retention))

    @property
    def _may_have_expired(self) -> bool:
        # The server set the expiry when it appended the `end`, which was after it was first sent. So before this moment
        # a stream that is gone was lost, whatever the server's clock says, and however late a reply is read.
        return time.monotonic() >= self._end_sent + self._ttl_after_end

    def _issue(self, behind: str, entries: list[StreamEntry]) -> asyncio.Future[Reply]:
        args: list[bytes | str | int] = [
            behind,
            self._session.wake_channel,
            self._max_length,
            self._ttl_after_end if entries[-1].type == "end" else keys.STREAM_TTL,
        ]
        for entry in entries:
            own_seq = b"-" if entry.own_seq is None else entry.own_seq
            args += (format_id(entry.id), entry.type, entry.origin, entry.raw_body, own_seq)
        return self._bus.run(APPEND, self._session.stream, *args)

    # --- after a refusal, or a reconnection ---

    async def compare(self, in_flight: list[StreamEntry]) -> bool:
        """Get in step with the stream; returns whether it is still ours.

        A batch that is there is acknowledged and taken out of `in_flight`; one that is not has ids that the server
        takes now. What the stream has lost of the entries acknowledged lately is appended again.

        Raises:
            RedisError, OSError: not known; ask again.
        """
        found = await self._read(self._acked)
        lost = self._acked not in found.entries
        if lost:
            found = await self._read(next(iter(self.kept), self.kept.begin or in_flight[0]).id)
            if self._may_have_expired and not any(entry in found for entry in self.kept):
                self.kept.clear()
                return True
        if found.is_of_another_run((*self.kept, *in_flight, self.kept.begin), known=self._acked):
            return False
        if in_flight and all(entry in found for entry in in_flight):  # a batch is appended whole, or none of it
            self.acknowledge(in_flight)
            in_flight.clear()
        top = found.top
        self.note(top)
        if lost:
            top = max(top, await self._restore([entry for entry in self.kept if entry not in found], top))
        if in_flight and in_flight[0].id <= top:
            # Their ids were refused for good, so nothing of them can arrive late: new ids, the same bodies.
            self._give_new_ids(in_flight)
        return True

    async def _read(self, first: StreamId) -> Found:
        return Found.of(await self._bus.execute("XRANGE", self._session.stream, format_id(first), "+"))

    async def _restore(self, lost: list[StreamEntry], top: StreamId) -> StreamId:
        """Append what a failover has lost, with its ids where they still fit; returns the last id."""
        whole = await self._bus.execute("XREVRANGE", self._session.stream, "+", "-", "COUNT", 1)
        if not whole and self.kept.begin is not None and self.kept.begin not in lost:
            lost.insert(0, self.kept.begin)
        if lost:
            if lost[0].id <= top:
                # Somebody's add() came first: whoever saw the lost ones sees them again, but nobody misses them.
                self._give_new_ids(lost)
            reply = await self._issue("", lost)
            if reply != b"ok":
                raise ResponseError("the stream changed meanwhile")
            logger.warning(
                "agx: %d events of session %s were lost and appended again", len(lost), self._session.session
            )
            self._acked = lost[-1].id
        elif whole:
            self._acked = parse_id(whole[0][0].decode())
        return self._acked

    def _give_new_ids(self, entries: list[StreamEntry]) -> None:
        for entry in entries:
            entry.id = self.next_id()
