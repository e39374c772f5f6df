"""The recovery window: for how long a run whose process died still counts as live, because another can resume it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

import orjson

from .bus import Bus
from .entry_id import parse_id
from .keys import STREAM_TTL, SessionKeys
from .redis_py import Reply


@dataclass(frozen=True, slots=True)
class RecoveryWindow:
    """The time in which a run without a process can be resumed.

    Args:
        run_id: the run.
        recover: seconds, from its `begin`.
    """

    run_id: str
    recover: float


def window_end_ms(recover: float, *, last_entry_ms: float, deadline_ms: float) -> float:
    """Return until when, server time, a run can be resumed: `recover` seconds after the last proof that it was alive.

    A run writes nothing while a long tool works, but its process renews the lease.

    Args:
        deadline_ms: when the lease of its last process expired, as `leases` has it.
    """
    return max(last_entry_ms, abs(deadline_ms)) + recover * 1_000


def handover_deadline(now_ms: int) -> int:
    """Return the deadline of a run that its process hands over: it has passed, and has the time with a minus."""
    return -now_ms


def is_handed_over(deadline_ms: float, last_entry_ms: float) -> bool:
    """Return whether the run's last process has handed it over, rather than died.

    A process that resumes a run sets a new deadline. If that write was lost, its entries are younger than the deadline.
    """
    return deadline_ms <= 0 and last_entry_ms <= -deadline_ms


@dataclass(frozen=True, slots=True)
class StreamEnds:
    """The first and the last entry of a session's stream, as replied; empty where there is no stream."""

    first: Reply
    last: Reply


def ask_ends(bus: Bus, session: SessionKeys) -> tuple[asyncio.Future[Reply], asyncio.Future[Reply]]:
    """Ask for a stream's first and last entry, in the round trip of what was issued before."""
    return (
        bus.execute("XRANGE", session.stream, "-", "+", "COUNT", 1),
        bus.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1),
    )


async def read_recovery_window(
    bus: Bus, session: SessionKeys, *, now_ms: int, lease_ttl: float
) -> RecoveryWindow | None:
    """Return the window of a session's latest run; None where the run has ended, or nobody can resume it any more.

    The live key is not looked at: as long as a process holds it, the run is live anyway. The last renewal is read from
    the index of the user's sessions, because a process that only listens may not read deadlines.

    Args:
        now_ms: server time, or an estimate of it.
        lease_ttl: seconds for which a process that died still held the lease.

    Raises:
        RedisError, OSError: Redis did not answer.
    """
    first, last = ask_ends(bus, session)
    return await find_recovery_window(bus, session, StreamEnds(await first, await last), now_ms, lease_ttl)


async def find_recovery_window(
    bus: Bus, session: SessionKeys, ends: StreamEnds, now_ms: int, lease_ttl: float
) -> RecoveryWindow | None:
    """Do the same as `read_recovery_window()` where the ends of the stream have been read."""
    first, last = ends.first, ends.last
    if not first or not last or first[0][1].get(b"type") != b"begin" or last[0][1].get(b"type") == b"end":
        return None
    try:
        body = orjson.loads(first[0][1].get(b"body", b"{}"))
    except orjson.JSONDecodeError:
        return None
    recover = parse_recover(body)
    if recover is None:
        return None
    last_entry_ms = parse_id(last[0][0].decode())[0]
    renewed_ms = float(await bus.execute("ZSCORE", session.index, session.session) or 0)
    deadline_ms = max(last_entry_ms, renewed_ms) + lease_ttl * 1_000
    ends_ms = window_end_ms(recover, last_entry_ms=last_entry_ms, deadline_ms=deadline_ms)
    return RecoveryWindow(str(body.get("run_id", "")), recover) if now_ms < ends_ms else None


def gap_ttl_ms(recover: float, *, lease_ttl: float) -> int:
    """Return for how many ms a cancel is kept that comes while no process has the run.

    A run can be resumed until `recover` seconds after its lease has expired, which is `lease_ttl` seconds from now at
    the latest.
    """
    return max(1, int((recover + lease_ttl) * 1_000))


def parse_recover(begin: object) -> float | None:
    """Return the seconds for which a run can be resumed, at most a day, from its `begin`; None where it cannot be."""
    value = begin.get("recover") if isinstance(begin, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return min(float(value), float(STREAM_TTL))
