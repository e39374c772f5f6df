"""`cancel()`: stops a run of any process. It marks the lease, which every renewal reads, and publishes the mark."""

from __future__ import annotations

import asyncio
import time

from redis.exceptions import RedisError

from ..engine.registry import current_engine
from ..errors import RedisUnavailableError
from ..redis.bus import Bus
from ..redis.keys import Id, SessionKeys
from ..redis.live_key import MARK_CANCELLED, MARK_GAP, gap_holder, parse_live
from ..redis.recovery_window import RecoveryWindow, gap_ttl_ms, read_recovery_window
from ..redis.retry import Backoff, retry

_CLAIM_WAIT = 1.0  # seconds a cancel waits for a recovery that looks whether the run was lost
_CLAIM_POLL = 0.05
_LOOK_FIRST, _LOOK_LAST = 0.01, 0.2  # seconds between two looks whether a cancelled run has ended


async def mark_cancelled(
    bus: Bus, session: SessionKeys, run_id: str | None = None, *, now_ms: int, lease_ttl: float
) -> bool:
    """Mark a session's lease and publish the mark; returns whether there was a live run to cancel.

    While a recovery claims the session it is not decided whether its run lives, so this waits for the decision. A run
    whose process died and that can be resumed gets a mark, too: the process that takes it over ends it.

    Args:
        run_id: cancel only this run; None cancels the run that is live.
        now_ms: server time, or an estimate of it.
        lease_ttl: seconds for which a process that died still held the lease.

    Raises:
        RedisError, OSError: not marked as far as is known.
    """
    only = () if run_id is None else (run_id,)
    deadline = time.monotonic() + _CLAIM_WAIT
    while (reply := await bus.run(MARK_CANCELLED, session.live, session.cancel_channel, *only)) != b"marked":
        if reply == b"none":
            window = await read_recovery_window(bus, session, now_ms=now_ms, lease_ttl=lease_ttl)
            if window is None or run_id not in (None, window.run_id):
                return False
            ttl_ms = gap_ttl_ms(window.recover, lease_ttl=lease_ttl)
            if await bus.run(MARK_GAP, session.live, gap_holder(window.run_id), ttl_ms):
                return True
            # Another process has just taken the run over, or another caller has marked it.
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_CLAIM_POLL)
    return True


async def keep_mark(bus: Bus, session: SessionKeys, run_id: str, *, now_ms: int, lease_ttl: float) -> None:
    """Wait until a cancelled run has ended, or until its cancel no longer depends on the lease of a process.

    A mark expires with the lease where the run's process has died, or dies before it acts on the mark. Then the gap,
    or the lease of the process that took the run over, is marked. This takes `lease_ttl` and a second at most. It
    returns at once for a run that nobody can resume.

    Args:
        now_ms: server time, or an estimate of it.
        lease_ttl: seconds for which a process that died still held the lease.

    Raises:
        RedisError, OSError: it is not known whether the run ends as cancelled.
    """
    pause, deadline = Backoff(_LOOK_FIRST, _LOOK_LAST), time.monotonic() + lease_ttl + _CLAIM_WAIT
    while not await retry(lambda: _is_settled(bus, session, run_id, now_ms=now_ms, lease_ttl=lease_ttl)):
        if time.monotonic() > deadline:
            return  # its process lives: it has renewed the lease, and has the mark
        await asyncio.sleep(pause.next())


async def _is_settled(bus: Bus, session: SessionKeys, run_id: str, *, now_ms: int, lease_ttl: float) -> bool:
    """Return whether a cancelled run has ended or its gap is marked; mark it again where the mark is gone."""
    window = await read_recovery_window(bus, session, now_ms=now_ms, lease_ttl=lease_ttl)
    if window is None or window.run_id != run_id:
        return True
    raw = await bus.execute("GET", session.live)
    value = None if raw is None else parse_live(raw)
    if value is None or value.kind != "cancelled":
        await mark_cancelled(bus, session, run_id, now_ms=now_ms, lease_ttl=lease_ttl)
        return False
    return value.is_gap_mark


async def cancel(scope_id: Id, user_id: Id, session_id: Id) -> bool:
    """Stop a session's live run, wherever it runs; returns whether there was one.

    The run ends by itself a moment later: follow it with `listen()` to see its `end`. For a run that another process
    can resume this waits until the run has ended, or until the process that resumes it will find the cancel: at most
    `lease_ttl` and a second, where the run's process has just died or does not stop.

    Raises:
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
        RedisUnavailableError: Redis can't be reached, so the run was not cancelled as far as is known.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    bus, lease_ttl = engine.control, engine.config.lease_ttl

    async def mark() -> tuple[bool, RecoveryWindow | None]:
        now_ms = engine.clock.now_ms()
        window = await read_recovery_window(bus, session, now_ms=now_ms, lease_ttl=lease_ttl)
        return await mark_cancelled(bus, session, now_ms=now_ms, lease_ttl=lease_ttl), window

    try:
        found, window = await retry(mark)
        if found and window is not None:
            await keep_mark(bus, session, window.run_id, now_ms=engine.clock.now_ms(), lease_ttl=lease_ttl)
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("cancel the run", error) from error
    return found
