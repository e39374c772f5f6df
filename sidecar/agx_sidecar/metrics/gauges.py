"""Measures what is not counted from facts: live runs, waiting jobs, the services' state, and both sinks' backlogs.

Live runs come from the leases, jobs from their queue, the services' state from their heartbeats. Trims come from the
server's own count of entries less the sink's, because the server's `lag` is unknown after a trim (contract, section 7).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redis.exceptions import ResponseError

from agx.redis import keys
from agx.redis.entry_id import parse_id

from ..link import Link
from ..source import QueueState
from . import instruments as i
from . import table as t
from .fold import HEARTBEAT_LIFE_MS, ZERO_ID, Fold, Position
from .series import LABEL_LENGTH, Sample
from .table import Instrument

logger = logging.getLogger(__name__)

# For `call_each()`: counts by scope in the server, so that only counts are transferred. `argument` is the id to go on
# from. The reply is the last id that was read, or an empty text if none is left, then each scope with its count.
_COUNT_BY_SCOPE = """
local counts, last = {}, ''
ADD_COUNTS
local reply = {last}
for scope, count in pairs(counts) do
  reply[#reply + 1] = scope
  reply[#reply + 1] = count
end
return reply
"""
# A lease past its deadline is no live run, even before the reaper saw it.
_ADD_LIVE = """
for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. string.format('%d', now), '+inf')) do
  local scope = string.match(member, '^([^:]+):[^:]+:[^:]+:[^:]+$')
  if scope then counts[scope] = (counts[scope] or 0) + 1 end
end
"""
_ADD_JOBS = """
local entries = redis.call('XRANGE', key, argument, '+', 'COUNT', MOST)
if #entries == MOST then last = entries[#entries][1] end
for _, entry in ipairs(entries) do
  local scope, due
  for at = 1, #entry[2], 2 do
    if entry[2][at] == 'scope' then scope = entry[2][at + 1] end
    if entry[2][at] == 'due' then due = tonumber(entry[2][at + 1]) end
  end
  if scope and (due or 0) <= now then counts[scope] = (counts[scope] or 0) + 1 end
end
"""
_MOST_JOBS = 1_000  # of all partitions, in one script: meanwhile the server executes nothing else


@dataclass(frozen=True, slots=True)
class Backlog:
    """The facts of one partition that a sink has yet to read."""

    length: int = 0
    lag_ms: int = 0


@dataclass(slots=True)
class TracesTrims:
    """Facts trimmed before the traces group had them delivered.

    Servers differ: when the group reads on after a gap, Valkey 9.1 counts the missing entries as read, Redis 7.0 never
    does. So the entries that are missing are followed from gap to gap, less those that were missing already when the
    group had last read everything.
    """

    total: int = 0
    at_sync: int = 0  # entries the server counts as not read although nothing is left to read
    gap: int = 0  # missing in front of the queue's first entry, as last seen

    def sync(self, missing: int) -> None:
        """Everything there is has been delivered, and `missing` entries were not, by the server's count."""
        self.total += max(0, missing - self.at_sync - self.gap)
        self.at_sync, self.gap = missing, 0

    def miss(self, missing: int) -> None:
        """The first entry is not delivered yet, and `missing` ones in front of it are gone."""
        gap = max(0, missing - self.at_sync)
        self.total += max(0, gap - self.gap)
        self.gap = gap


async def count_live(link: Link, prefix: str, partitions: int) -> dict[str, int]:
    """Return how many runs are alive, by scope."""
    return await _count(link, _ADD_LIVE, [keys.leases(prefix, n) for n in range(partitions)])


async def count_jobs(link: Link, prefix: str, partitions: int) -> dict[str, int]:
    """Return how many jobs are due and have not begun, by scope."""
    add_counts = _ADD_JOBS.replace("MOST", str(max(1, _MOST_JOBS // partitions)))
    return await _count(link, add_counts, [keys.jobs(prefix, n) for n in range(partitions)])


async def count_approvals(link: Link, prefix: str, partitions: int) -> dict[str, int]:
    """Return how many tool calls wait for a decision, by scope.

    This takes a command for each partition. One script would need the right to write these keys, which a sidecar lacks.
    """
    waiting: Counter[str] = Counter()
    for n in range(partitions):
        key = keys.approvals(prefix, n)
        try:
            names = {name.decode("utf-8", "replace") for name in await link.call("HKEYS", key)}
        except ResponseError as error:
            link.report_refusal(f"look into {key}", error)
            continue
        waiting.update(name.split(":", 2)[1] for name in names if name[:2] == "c:" and f"d{name[1:]}" not in names)
    return dict(waiting)


async def _count(link: Link, add_counts: str, partition_keys: Sequence[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    cursors = dict.fromkeys(partition_keys, "-")
    while cursors:
        replies = await link.call_each(_COUNT_BY_SCOPE.replace("ADD_COUNTS", add_counts), cursors)
        cursors = {}
        for key, reply in replies.items():
            if isinstance(reply, ResponseError):
                link.report_refusal(f"read {key}", reply)
                continue
            last, *scopes = reply
            for scope, count in zip(scopes[::2], scopes[1::2], strict=True):
                counts[scope.decode("utf-8", "replace")] += int(count)
            if last:
                cursors[key] = f"({last.decode()}"
    return dict(counts)


def measure_metrics(link: Link, key: str, position: Position, read: Position, state: QueueState) -> Backlog:
    """Return what waits for the metrics sink; moves `position` where the queue was trimmed or began anew.

    `read` is the position before the request, because the reader goes on while the server answers.
    """
    if parse_id(state.last_id) < parse_id(read.last_id) or state.entries_added < read.count:
        _start_over(key, state, position)
        read = position
        next_id = state.first_entry
    elif state.last_id == read.last_id:
        position.trimmed = max(position.trimmed, state.entries_added - read.count)
        return Backlog()
    else:
        next_id = state.next_id
    if next_id is None:
        return Backlog()
    unread = state.entries_added - read.count - read.trimmed
    return Backlog(min(state.length, max(1, unread)), _age(link, next_id))


def _start_over(key: str, state: QueueState, position: Position) -> None:
    """Read the queue from its start; what is known is passed over.

    What went from a queue that still has some of ours was counted before it went.
    """
    logger.warning("%s began anew (Redis lost data, or it had expired): reading it from its start", key)
    is_ours = state.first_entry is not None and parse_id(state.first_entry) <= parse_id(position.last_id)
    gone = state.entries_added - state.length if is_ours else 0
    position.count = gone - position.trimmed
    position.last_id = ZERO_ID


def measure_traces(link: Link, trims: TracesTrims, state: QueueState) -> Backlog | None:
    """Return what waits for the traces sink, undelivered or unacknowledged; None if no such sink ever read."""
    group = state.group
    if group is None:
        return None
    oldest, undelivered = group.next_id, 0
    missing = state.entries_added - group.entries_read
    if state.last_id == group.delivered_id:
        trims.sync(missing)
    elif state.first_entry is not None and parse_id(group.delivered_id) < parse_id(state.first_entry):
        trims.miss(missing - state.length)
        undelivered = state.length
    elif oldest is not None:
        undelivered = min(state.length, max(1, missing - trims.at_sync))
    oldest = group.oldest_id or oldest
    return Backlog(undelivered + group.pending, _age(link, oldest) if oldest else 0)


def _age(link: Link, entry_id: str) -> int:
    return max(0, link.now_ms() - parse_id(entry_id)[0])


def sample_gauges(
    fold: Fold,
    traces_trims: Mapping[int, TracesTrims],
    by_scope: Mapping[Instrument, Mapping[str, int]],
    backlogs: Mapping[tuple[int, str], Backlog],
    now_ms: int,
) -> dict[Instrument, list[Sample]]:
    """Return the fleet's gauges, and the trims, at one moment."""
    samples: dict[Instrument, list[Sample]] = {
        **{gauge: _sample_scopes(fold, counts) for gauge, counts in by_scope.items()},
        i.QUEUE_LENGTH: [Sample((str(n), sink), at.length) for (n, sink), at in backlogs.items()],
        i.QUEUE_LAG: [Sample((str(n), sink), at.lag_ms) for (n, sink), at in backlogs.items()],
        i.QUEUE_TRIMMED: [
            Sample((str(n), sink), at.trimmed if sink == "metrics" else traces_trims[n].total)
            for n, at in sorted(fold.positions.items())
            for sink in ("metrics", "traces")
            if sink == "metrics" or (n, sink) in backlogs
        ],
    }
    samples.update(_by_service(fold, now_ms))
    return samples


def _sample_scopes(fold: Fold, measured: Mapping[str, int]) -> list[Sample]:
    """Return a sample for each known scope; one that is not measured has zero."""
    counts = dict.fromkeys(fold.series.values(t.SCOPE), 0)
    for scope, count in measured.items():
        label = scope if scope in counts else fold.series.capped(t.SCOPE, scope)
        if label == scope and len(counts) >= t.SCOPE.cap:
            label = scope if scope in counts else t.OTHER
        counts[label] = counts.get(label, 0) + count
    return [Sample((scope,), count) for scope, count in sorted(counts.items())]


def _by_service(fold: Fold, now_ms: int) -> dict[Instrument, list[Sample]]:
    """Sum listeners and buffers over a service's processes; of the silences take the longest."""
    sums: dict[str, tuple[int, int, int]] = {}
    versions: set[tuple[str, str]] = set()
    for at_ms, heartbeat in fold.heartbeats.values():
        if now_ms - at_ms > HEARTBEAT_LIFE_MS:
            continue
        name = fold.series.capped(t.SERVICE, heartbeat.service.name)
        labels = (name, (heartbeat.service.version or "")[:LABEL_LENGTH])
        versions.add(labels if labels in versions or len(versions) < t.LABEL_CAP else (name, t.OTHER))
        listeners, buffered, silence = sums.get(name, (0, 0, 0))
        sums[name] = (
            listeners + heartbeat.listeners,
            buffered + heartbeat.buffered_events,
            max(silence, heartbeat.silence_ns),
        )
    services = sorted(sums.items())
    return {
        i.SERVICE_INFO: [Sample(labels, 1) for labels in sorted(versions)],
        i.LISTENERS: [Sample((name,), of[0]) for name, of in services],
        i.BUFFERED: [Sample((name,), of[1]) for name, of in services],
        i.SILENCE: [Sample((name,), of[2]) for name, of in services],
    }
