"""The events that a `resume` makes void: the answer and the sub-agents of a dead process (contract, section 4)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pydantic_ai.messages import CustomEvent
from redis.exceptions import RedisError

from ..redis.bus import Bus
from ..redis.entry_id import StreamId, format_id
from ..redis.keys import SessionKeys
from ..redis.recovery_window import parse_recover
from ..stream.entry import RUNTIME, Body, StreamEntry

_PAGE = 500  # entries a read


@dataclass(frozen=True, slots=True)
class Void:
    """The events before a `resume` that do not count.

    Args:
        resume_id: the id of that `resume`.
        idx: the model request whose events are void, from the number `from_seq` on; None: none.
        runs: the sub-agents whose events are void.
    """

    resume_id: StreamId
    idx: int | None = None
    from_seq: int = 0
    runs: frozenset[str] = frozenset()

    def covers(self, entry: StreamEntry) -> bool:
        """Return whether an entry is void, or is the `resume` itself."""
        if entry.id == self.resume_id:
            return True
        if entry.type != "event" or entry.is_users or entry.id > self.resume_id:
            return False
        if entry.is_from_sub_agent:
            return bool(self.runs) and entry.body.get("run") in self.runs
        return self.idx is not None and entry.body.get("idx") == self.idx and (entry.seq or 0) >= self.from_seq


@dataclass(kw_only=True)
class ResumeEvent(CustomEvent, name="agx-resume"):
    """Another process goes on with the run, and what this replay has given of the last response is void.

    Its body: `attempt`, `void` as on the stream (`idx`, `from_seq`), and `tool_call_ids` of the calls that are void.
    """

    body: Body

    def to_payload(self) -> Body:
        """Return the body."""
        return self.body


def find_voids(entries: Iterable[StreamEntry]) -> list[Void]:
    """Return what the entries of type `resume` make void."""
    return [void for entry in entries if (void := _parse(entry)) is not None]


def is_void(entry: StreamEntry, voids: Collection[Void]) -> bool:
    """Return whether an entry counts for nothing."""
    return any(void.covers(entry) for void in voids)


async def read_voids(bus: Bus, session: SessionKeys) -> list[Void]:
    """Return what the `resume` entries on a session's stream have made void so far."""
    found: list[Void] = []
    cursor = "-"
    try:
        while True:
            page = await bus.execute("XRANGE", session.stream, cursor, "+", "COUNT", 1 if cursor == "-" else _PAGE)
            entries = [StreamEntry.of(*entry) for entry in page]
            if cursor == "-" and (not entries or parse_recover(entries[0].body) is None):
                return []  # nobody can have resumed it
            found += find_voids(entries)
            if not entries:
                return found
            cursor = f"({format_id(entries[-1].id)}"
    except (RedisError, OSError):
        return found  # the rest is found where its `resume` is read


def _parse(entry: StreamEntry) -> Void | None:
    if entry.type != "resume" or entry.origin != RUNTIME:
        return None
    body = entry.body
    runs = frozenset(void_runs(body))
    void = body.get("void")
    idx, from_seq = (void.get("idx"), void.get("from_seq")) if isinstance(void, dict) else (None, None)
    if isinstance(idx, int) and isinstance(from_seq, int):
        return Void(entry.id, idx, from_seq, runs)
    return Void(entry.id, runs=runs) if runs else None


def void_runs(body: Body) -> list[str]:
    """Return the sub-agents whose events a `resume` makes void, by run."""
    runs = body.get("void_runs")
    return [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []
