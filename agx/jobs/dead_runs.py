"""Finds runs whose process died and that a worker can resume: by their deadlines, then by the live key itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container

from ..engine.engine import Engine
from ..recovery.dead_run import DeadRun, read_dead_run
from ..redis import keys
from ..redis.live_key import parse_live

_AT_ONCE = 100  # runs past their deadline that one look takes from a partition


async def find_dead_runs(engine: Engine, agents: Container[str], *, known: Container[str]) -> AsyncIterator[DeadRun]:
    """Yield dead runs of some agents that may be tried again.

    Args:
        agents: names of the recipes at hand.
        known: ids of runs that this process has already.

    Raises:
        RedisError, OSError: Redis did not answer.
    """
    now_ms = engine.clock.now_ms()
    prefix = engine.config.key_prefix
    for n in range(engine.queues.partitions or 1):
        members = await engine.control.execute(
            "ZRANGEBYSCORE", keys.leases(prefix, n), "-inf", now_ms, "LIMIT", 0, _AT_ONCE
        )
        for member in members:
            try:
                session, run_id = keys.parse_lease_member(prefix, member.decode())
            except ValueError:
                continue  # not ours; the sidecar removes it
            if run_id in known or _is_held(await engine.control.execute("GET", session.live), run_id):
                continue  # the deadline is only a hint
            dead = await read_dead_run(engine.control, session, run_id)
            if dead is not None and dead.job.agent in agents and not dead.exhausted:
                yield dead


def _is_held(held: bytes | None, run_id: str) -> bool:
    """Return whether somebody has the session; a cancel that came after the run's process died is nobody's."""
    if held is None:
        return False
    value = parse_live(held)
    return not (value.is_gap_mark and value.run_id == run_id)
