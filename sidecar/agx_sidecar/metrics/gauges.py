"""Measures what is not counted from facts: live runs, waiting jobs, the services' state, and both sinks' backlogs.

Live runs come from the leases, jobs from their queue, the services' state from their heartbeats. Trims come from the
server's own count of entries less the sink's, because the server's `lag` is unknown after a trim (contract, section 7).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from agx.redis import keys
from agx.redis.entry_id import parse_id

from ..link import Link
from ..source import TRACES_GROUP, QueueEnd, find_end, first_id_after
from . import instruments as i
from . import table as t
from .fold import HEARTBEAT_LIFE_MS, ZERO_ID, Fold, Position
from .series import LABEL_LENGTH, Sample
from .table import Instrument

logger = logging.getLogger(__name__)

# One key, the server's own clock: a lease past its deadline is no live run, even before the reaper saw it.
_LIVE_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%d', now), '+inf')
"""

# Counts jobs by scope in the server: a job holds its prompt and arguments. ARGV: first id, entries a look.
# Replies the last id that was looked at, or an empty text at the end, then each scope with its number of due jobs.
_JOBS_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local entries = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
local counts, reply = {}, {''}
if #entries == tonumber(ARGV[2]) then reply[1] = entries[#entries][1] end
for _, entry in ipairs(entries) do
  local scope, due
  for at = 1, #entry[2], 2 do
    if entry[2][at] == 'scope' then scope = entry[2][at + 1] end
    if entry[2][at] == 'due' then due = tonumber(entry[2][at + 1]) end
  end
  if scope and (due or 0) <= now then counts[scope] = (counts[scope] or 0) + 1 end
end
for scope, count in pairs(counts) do
  reply[#reply + 1] = scope
  reply[#reply + 1] = count
end
return reply
"""
_JOBS_A_LOOK = 1_000


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
    live: dict[str, int] = {}
    for n in range(partitions):
        for member in await link.call("EVAL", _LIVE_SCRIPT, 1, keys.leases(prefix, n)):
            try:
                session, _ = keys.parse_lease_member(prefix, member.decode())
            except ValueError:  # not one of ours
                continue
            live[session.scope] = live.get(session.scope, 0) + 1
    return live


async def count_jobs(link: Link, prefix: str, partitions: int) -> dict[str, int]:
    """Return how many jobs are due and have not begun, by scope."""
    waiting: dict[str, int] = {}
    for n in range(partitions):
        cursor = "-"
        while cursor:
            last, *counts = await link.call("EVAL", _JOBS_SCRIPT, 1, keys.jobs(prefix, n), cursor, _JOBS_A_LOOK)
            for scope, count in zip(counts[::2], counts[1::2], strict=True):
                name = scope.decode("utf-8", "replace")
                waiting[name] = waiting.get(name, 0) + int(count)
            cursor = f"({last.decode()}" if last else ""
    return waiting


async def count_approvals(link: Link, prefix: str, partitions: int) -> dict[str, int]:
    """Return how many tool calls wait for a decision, by scope."""
    waiting: Counter[str] = Counter()
    for n in range(partitions):
        fields = [field.decode("utf-8", "replace") for field in await link.call("HKEYS", keys.approvals(prefix, n))]
        decided = {field[1:] for field in fields if field[0] == "d"}
        waiting.update(field.split(":", 2)[1] for field in fields if field[0] == "c" and field[1:] not in decided)
    return dict(waiting)


async def measure_metrics(link: Link, key: str, position: Position) -> Backlog:
    """Return what waits for the metrics sink; moves `position` where the queue was trimmed or began anew."""
    # The reader goes on while we ask: the reply is compared with where it stood before.
    last_id, count = position.last_id, position.count
    end = await find_end(link, key)
    if end is None:
        return Backlog()
    if parse_id(end.last_id) < parse_id(last_id) or end.entries_added < count:
        _start_over(key, end, position)
    elif end.last_id == last_id:
        position.trimmed = max(position.trimmed, end.entries_added - count)
        return Backlog()
    first = await first_id_after(link, key, position.last_id)
    if first is None:
        return Backlog()
    unread = end.entries_added - position.count - position.trimmed
    return Backlog(min(end.length, max(1, unread)), _age(link, first))


def _start_over(key: str, end: QueueEnd, position: Position) -> None:
    """Read the queue from its start; what is known is passed over.

    What went from a queue that still has some of ours was counted before it went.
    """
    logger.warning("%s began anew (Redis lost data, or it had expired): reading it from its start", key)
    is_ours = end.first_id is not None and parse_id(end.first_id) <= parse_id(position.last_id)
    gone = end.entries_added - end.length if is_ours else 0
    position.count = gone - position.trimmed
    position.last_id = ZERO_ID


async def measure_traces(link: Link, key: str, trims: TracesTrims) -> Backlog | None:
    """Return what waits for the traces sink, undelivered or unacknowledged; None if no such sink ever read."""
    group = await _find_group(link, key)
    end = await find_end(link, key)
    if group is None or end is None:
        return None
    delivered = group["last-delivered-id"].decode()
    read = int(group["entries-read"] or 0)
    oldest: str | None = None
    undelivered = 0
    if end.last_id != delivered:
        oldest = await first_id_after(link, key, delivered)
    if end.last_id == delivered:
        trims.sync(end.entries_added - read)
    elif end.first_id is not None and parse_id(delivered) < parse_id(end.first_id):
        trims.miss(end.entries_added - end.length - read)
        undelivered = end.length
    elif oldest is not None:
        undelivered = min(end.length, max(1, end.entries_added - read - trims.at_sync))
    if group["pending"]:
        summary = await link.call("XPENDING", key, TRACES_GROUP)
        if summary["min"]:
            oldest = summary["min"].decode()
    return Backlog(undelivered + int(group["pending"]), _age(link, oldest) if oldest else 0)


async def _find_group(link: Link, key: str) -> dict[str, Any] | None:
    try:
        groups = await link.call("XINFO GROUPS", key)
    except ResponseError as error:
        if "no such key" in str(error).lower():
            return None
        raise
    return next((group for group in groups if group["name"] == TRACES_GROUP.encode()), None)


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
