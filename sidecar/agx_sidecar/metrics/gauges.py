"""What is not counted but looked at: live runs from the leases, services from their beats, queues from Redis."""

from __future__ import annotations

from collections.abc import Mapping

from agx.redis import keys

from ..link import Link
from . import instruments as i
from .backlog import Waiting
from .fold import BEAT_LIFE_MS, Fold
from .series import Shown

# One key, the server's own clock: a lease past its deadline is no live run, even before the reaper saw it.
_LIVE_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%d', now), '+inf')
"""


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


def show_gauges(
    fold: Fold, live: Mapping[str, int], waiting: Mapping[tuple[int, str], Waiting], now_ms: int
) -> dict[i.Instrument, list[Shown]]:
    """Return the fleet's gauges, and the trims, at one moment."""
    shown: dict[i.Instrument, list[Shown]] = {
        i.RUNS_LIVE: _live_by_scope(fold, live),
        i.QUEUE_LENGTH: [Shown((str(n), sink), at.length) for (n, sink), at in waiting.items()],
        i.QUEUE_LAG: [Shown((str(n), sink), at.lag_ms) for (n, sink), at in waiting.items()],
        i.QUEUE_TRIMMED: [
            Shown((str(n), sink), at.trimmed if sink == "metrics" else at.traces.total)
            for n, at in sorted(fold.positions.items())
            for sink in ("metrics", "traces")
            if sink == "metrics" or (n, sink) in waiting
        ],
    }
    shown.update(_by_service(fold, now_ms))
    return shown


def _live_by_scope(fold: Fold, live: Mapping[str, int]) -> list[Shown]:
    counts = dict.fromkeys(fold.series.values("scope"), 0)
    for scope, count in live.items():
        label = scope if scope in counts else fold.series.capped("scope", scope)
        if label == scope and len(counts) >= i.LABEL_CAPS["scope"]:
            label = scope if scope in counts else i.OTHER
        counts[label] = counts.get(label, 0) + count
    return [Shown((scope,), count) for scope, count in sorted(counts.items())]


def _by_service(fold: Fold, now_ms: int) -> dict[i.Instrument, list[Shown]]:
    """Sum listeners and buffers over a service's processes; of the silences the longest counts."""
    sums: dict[str, tuple[int, int, int]] = {}
    for at_ms, beat in fold.beats.values():
        if now_ms - at_ms > BEAT_LIFE_MS:
            continue
        name = fold.series.capped("service", beat.service.name)
        listeners, buffered, silence = sums.get(name, (0, 0, 0))
        sums[name] = (listeners + beat.listeners, buffered + beat.buffered_events, max(silence, beat.silence_ns))
    services = sorted(sums.items())
    return {
        i.LISTENERS: [Shown((name,), of[0]) for name, of in services],
        i.BUFFERED: [Shown((name,), of[1]) for name, of in services],
        i.SILENCE: [Shown((name,), of[2]) for name, of in services],
    }
