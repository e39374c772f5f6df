"""The events of one session that wait to be sent: deltas of the same part are merged while they wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..redis.entry_id import StreamId
from .entry import Body, StreamEntry
from .events import Part, UserBody, encode_body


@dataclass(slots=True)
class PendingEntry:
    """An event that waits: a body, or the deltas of one part, which collect in `pieces`."""

    type: str
    origin: str
    body: Body | None
    part: Part | None = None
    pieces: list[str] = field(default_factory=list)
    size: int = 0  # characters in `pieces`
    checkpoint: bytes | None = None

    def stamp(self, id: StreamId, seq: int, max_body: int) -> StreamEntry:
        """Return the entry as it is sent: id, number and bytes are final."""
        own_seq: bytes | None = None
        if isinstance(self.body, UserBody) and self.body.is_ambiguous(self.origin):
            body: Body = self.body
            own_seq = b"%d" % seq
        else:
            body = self._make_body()
            body["seq"] = seq
        return StreamEntry(id, self.type, self.origin, encode_body(body, max_body), own_seq, self.checkpoint)

    def _make_body(self) -> Body:
        if self.part is not None:
            return self.part.delta("".join(self.pieces))
        return UserBody(self.body) if isinstance(self.body, UserBody) else dict(self.body or {})


class Pending:
    """The queue of these events."""

    def __init__(self, max_body: int) -> None:
        self.entries: deque[PendingEntry] = deque()
        # Characters: an escaped one takes six bytes, and a merged body must never be cut.
        self._max_merged = max_body // 8

    def put(self, type: str, origin: str, body: Body, checkpoint: bytes | None) -> None:
        self.entries.append(PendingEntry(type, origin, body, checkpoint=checkpoint))

    def put_delta(self, origin: str, part: Part, text: str) -> bool:
        """Add a delta; returns False where it was merged with the one before."""
        entries = self.entries
        if entries and (last := entries[-1]).part is part and last.size < self._max_merged:
            last.pieces.append(text)
            last.size += len(text)
            return False
        entries.append(PendingEntry("event", origin, None, part, [text], len(text)))
        return True
