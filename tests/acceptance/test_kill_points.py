"""A worker is killed with SIGKILL at every step of a small run, one run for each: all end once, with the answer.

Here a sample of the steps; `make chaos` plays all of them.
"""

from __future__ import annotations

from pathlib import Path

from redis.asyncio import Redis
from support.durable_worker import LEASE_TTL
from support.kill_points import KilledRun, count_steps, play, wrongs

import agx

SAMPLE = 12


async def test_a_run_survives_a_kill_at_any_step(redis_url: str, tmp_path: Path) -> None:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE_TTL, retention=60))
        try:
            steps = await count_steps(redis_url, tmp_path)
            runs = [KilledRun(at, tmp_path) for at in range(1, steps, steps // SAMPLE)]
            await play(redis_url, runs)
            assert [wrong for run in runs for wrong in await wrongs(run)] == []
        finally:
            await agx.aclose()
    # The number of steps differs a little from run to run, so the last workers may have left before theirs.
    assert sum(run.was_killed for run in runs) > 0.7 * SAMPLE
