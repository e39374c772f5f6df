"""The end of a session's stream as its run wrote it: ids, acknowledged entries, the comparison with the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from redis.exceptions import ResponseError

from ..redis import keys
from ..redis.entry_id import StreamId, format_id, parse_id
from ..redis.redis_py import Reply
from .append_scripts import APPEND
from .entry import StreamEntry, to_arguments
from .write_side import WriteSide

logger = logging.getLogger("agx")

_MAX_ENTRIES = 4_096
_MAX_BYTES = 4_194_304


class StreamTail:
    """Appends the batches of one run, and compares the stream with them (contract, section 4, append rule)."""

    def __init__(
        self,
        side: WriteSide,
        session: keys.SessionKeys,
        *,
        retention: float,
        on_end: Callable[[int], None],
    ) -> None:
        self.retained = Retained(side.settings.retain)
        self.written_bytes = 0  # of bodies and checkpoints, that the server has acknowledged
        self.retention = retention  # seconds the stream is kept after its `end`
        self._on_end = on_end
        self._end_sent = float("inf")  # monotonic, when our `end` was first sent
        self._bus = side.bus
        self._session = session
        self._wake_channel = session.wake_channel
        self._clock = side.clock
        self._max_length = side.settings.max_length
        self._last: StreamId = (0, 0)  # id of the last entry given, or seen
        self._acked: StreamId = (0, 0)

    def next_id(self) -> StreamId:
        """Return an id above all that were returned or seen before; it carries the server's time."""
        ms, n = self._last
        now = self._clock.now_ms()
        self._last = (now, 0) if now > ms else (ms, n + 1)
        return self._last

    def note(self, seen: StreamId) -> None:
        """Note the id of an entry in the stream: new ids are above it."""
        self._last = max(self._last, seen)

    def begin(self, entry: StreamEntry) -> None:
        """Record that our `begin`, or `resume`, is acknowledged."""
        self.retained.begin = entry
        self.acknowledge([entry])

    def acknowledge(self, entries: list[StreamEntry]) -> None:
        """Record that the server has these entries, in this order."""
        self.written_bytes += self.retained.add(entries)
        last = entries[-1]
        self._acked = last.id
        if last.type == "end":
            self._on_end(last.id[0])

    def append(self, entries: list[StreamEntry]) -> asyncio.Future[Reply]:
        """Send a batch that has to follow our last acknowledged entry: all of it is appended, or nothing.

        Where it is appended, the reply is the number of processes that got the wake-up.
        """
        if entries[-1].type == "end":
            self._end_sent = min(self._end_sent, time.monotonic())
        return self._issue(format_id(self._acked), entries)

    @property
    def _ttl_after_end(self) -> int:
        return max(1, int(self.retention))

    @property
    def _may_have_expired(self) -> bool:
        # The server set the expiry when it appended the `end`, which was after it was first sent. So before this moment
        # a stream that is gone was lost, whatever the server's clock shows, and however late a reply is read.
        return time.monotonic() >= self._end_sent + self._ttl_after_end

    def _issue(self, after: str, entries: list[StreamEntry]) -> asyncio.Future[Reply]:
        args: list[bytes | str | int] = [
            after,
            self._wake_channel,
            self._max_length,
            self._ttl_after_end if entries[-1].type == "end" else keys.STREAM_TTL,
        ]
        for entry in entries:
            args += (format_id(entry.id), *to_arguments(entry))
        return self._bus.run(APPEND, self._session.stream, *args)

    # --- after a refusal or a reconnection

    async def compare(self, in_flight: list[StreamEntry]) -> bool:
        """Compare the stream with what was sent; returns False if it belongs to another run, or another ended it.

        A batch that is in the stream is acknowledged and removed from `in_flight`; else it has ids that the server
        accepts now. Retained entries that the stream has lost are appended again.

        Raises:
            RedisError, OSError: the result is not known; compare again.
        """
        found = await self._read(self._acked)
        lost = self._acked not in found.entries
        if lost:
            found = await self._read(next(iter(self.retained), self.retained.begin or in_flight[0]).id)
            if self._may_have_expired and not any(entry in found for entry in self.retained):
                self.retained.clear()
                return True
        if found.is_of_another_run((*self.retained, *in_flight, self.retained.begin), known=self._acked):
            return False
        if in_flight and all(entry in found for entry in in_flight):  # a batch is appended whole, or none of it
            self.acknowledge(in_flight)
            in_flight.clear()
        top = found.top
        self.note(top)
        if lost:
            top = max(top, await self._restore([entry for entry in self.retained if entry not in found], top))
        if in_flight and in_flight[0].id <= top:
            # The server has refused these ids for good, so a late copy can't be appended either: new ids, same bodies.
            self._give_new_ids(in_flight)
        return True

    async def _read(self, first: StreamId) -> Found:
        return Found.of(await self._bus.execute("XRANGE", self._session.stream, format_id(first), "+"))

    async def _restore(self, lost: list[StreamEntry], top: StreamId) -> StreamId:
        """Append lost entries again, with their ids if these are still above the last; returns the last id."""
        whole = await self._bus.execute("XREVRANGE", self._session.stream, "+", "-", "COUNT", 1)
        if not whole and self.retained.begin is not None and self.retained.begin not in lost:
            lost.insert(0, self.retained.begin)
        if lost:
            if lost[0].id <= top:
                # Somebody's add() came first: a listener that had the lost entries gets them again; none misses them.
                self._give_new_ids(lost)
            reply = await self._issue("", lost)
            if not isinstance(reply, int):
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


class Retained:
    """The entries of the last `seconds`, within limits, and always the `begin`, which shows whose stream it is."""

    def __init__(self, seconds: float) -> None:
        self.begin: StreamEntry | None = None
        self._seconds = seconds
        self._entries: deque[tuple[float, int, StreamEntry]] = deque()  # when it was acknowledged, its bytes
        self._bytes = 0

    def add(self, entries: Iterable[StreamEntry]) -> int:
        """Retain entries that were acknowledged just now, and drop old ones; returns the bytes of the entries."""
        now, added = time.monotonic(), 0
        for entry in entries:
            size = entry.size
            self._entries.append((now, size, entry))
            added += size
        self._bytes += added
        self._expire(now)
        return added

    def _expire(self, now: float) -> None:
        entries, oldest = self._entries, now - self._seconds
        while entries and (
            entries[0][0] < oldest or len(entries) > _MAX_ENTRIES or (self._bytes > _MAX_BYTES and len(entries) > 1)
        ):
            self._bytes -= entries.popleft()[1]

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()
        self._bytes = 0

    def __iter__(self) -> Iterator[StreamEntry]:
        self._expire(time.monotonic())
        return (entry for _, _, entry in self._entries)

    def __bool__(self) -> bool:
        self._expire(time.monotonic())
        return bool(self._entries)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a stream, by id."""

    entries: dict[StreamId, StreamEntry]

    @classmethod
    def of(cls, reply: Reply) -> Found:
        return cls({entry.id: entry for entry in (StreamEntry.of(*raw) for raw in reply)})

    def __contains__(self, entry: StreamEntry) -> bool:
        found = self.entries.get(entry.id)
        return found is not None and found.raw_body == entry.raw_body

    @property
    def top(self) -> StreamId:
        return max(self.entries, default=(0, 0))

    def is_of_another_run(self, ours: Iterable[StreamEntry | None], *, known: StreamId) -> bool:
        """Whether another process began or ended a run here; the entry `known` is ours, though no longer retained."""
        bodies = {entry.id: entry.raw_body for entry in ours if entry is not None}
        return any(
            entry.type in ("begin", "resume", "end") and bodies.get(entry.id) != entry.raw_body
            for entry in self.entries.values()
            if entry.id != known
        )
