"""Reads a run whose process died from its stream: what a successor needs to go on (contract, section 4, `resume`)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from ..checkpoints.codec import is_newer
from ..checkpoints.job import Job, UnreadableJobError, decode
from ..redis.bus import Bus
from ..redis.entry_id import StreamId, format_id
from ..redis.keys import SessionKeys
from ..stream.entry import AGENT, StreamEntry
from .recorded_run import RecordedRun

_PAGE = 1_000  # entries a read


@dataclass(frozen=True, slots=True)
class DeadRun:
    """A run whose stream has no `end` and whose process holds no lease.

    Args:
        job: how the run is made again; its `attempt` is the one that comes next.
        record: the run as its stream shows it.
        last_id: id of the last entry that was read.
        checkpoints: those after `begin`, of all attempts.
        void: which events of an unanswered request the dead attempt streamed, `{"idx", "from_seq"}`; None if none.
            Those of the sub-agents that were under way count for nothing either.
        deadline_ms: the deadline of the run's last process, as `leases` has it.
    """

    session: SessionKeys
    job: Job
    record: RecordedRun
    last_id: StreamId
    checkpoints: tuple[bytes, ...]
    void: dict[str, int] | None
    deadline_ms: float

    @property
    def run_id(self) -> str:
        return self.job.run_id

    @property
    def has_all_facts(self) -> bool:
        """Whether the last process handed the run over between two steps: it has queued the facts of all steps."""
        return self.record.handed_over and all(
            request.end_ns is not None and request.begun_calls.keys() <= request.returns.keys()
            for request in self.record.requests[-1:]
        )

    @property
    def exhausted(self) -> bool:
        """Whether the run may not be tried again: too many attempts in a row made no progress."""
        return self.record.is_exhausted

    @property
    def must_run_alone(self) -> bool:
        """Whether the run may stop its process: its next attempt without progress is the last one it has."""
        return self.record.failed_attempts >= max(1, self.job.max_attempts - 1)


async def read_dead_run(
    bus: Bus, session: SessionKeys, run_id: str, agents: Container[str], *, deadline_ms: float
) -> DeadRun | None:
    """Return a run that this version can resume, as its stream has it; None where it ended, or nobody can resume it.

    Args:
        agents: of other agents' runs only the first entry is read.
        deadline_ms: the deadline of the run's last process, as `leases` has it.

    Raises:
        RedisError, OSError: the stream could not be read.
    """
    first = await _read_page(bus, session, "-", 1)
    if not first or first[0].type != "begin" or first[0].checkpoint is None or first[0].body.get("run_id") != run_id:
        return None
    try:
        job = decode(first[0].checkpoint)
    except UnreadableJobError:
        return None
    if job.agent not in agents:
        return None
    entries = page = first
    while page is first or len(page) == _PAGE:
        page = await _read_page(bus, session, f"({format_id(entries[-1].id)}", _PAGE)
        entries = [*entries, *page]
    if any(entry.checkpoint is not None and is_newer(entry.checkpoint) for entry in entries[1:]):
        return None  # left to a newer version
    record = RecordedRun.of(run_id, entries, deadline_ms=deadline_ms)
    if record.end is not None:
        return None
    return DeadRun(
        session=session,
        job=replace(job, attempt=record.attempt + 1),
        record=record,
        last_id=entries[-1].id,
        checkpoints=tuple(entry.checkpoint for entry in entries[1:] if entry.checkpoint is not None),
        void=_void(entries),
        deadline_ms=deadline_ms,
    )


async def _read_page(bus: Bus, session: SessionKeys, start: str, count: int) -> list[StreamEntry]:
    page = await bus.execute("XRANGE", session.stream, start, "+", "COUNT", count)
    return [StreamEntry.of(entry_id, fields) for entry_id, fields in page]


def _void(entries: Sequence[StreamEntry]) -> dict[str, int] | None:
    """Return the request that was under way: from which entry on its events count for nothing."""
    open_request: dict[str, int] | None = None
    for entry in entries:
        if entry.type != "event" or entry.origin != AGENT or entry.seq is None:
            continue
        body = entry.body
        if body.get("event") == "llm-begin" and isinstance(body.get("idx"), int):
            open_request = {"idx": body["idx"], "from_seq": entry.seq}
        elif body.get("event") == "llm-end":
            open_request = None
    return open_request
