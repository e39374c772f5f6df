"""A service for compose.yaml with endless traffic: the demo's agents, on the Redis of AGX_REDIS_URL.

Its model is scripted: no key and no network. Runs complete, are cancelled, fail, or lose their process, until SIGTERM.
It goes on while no sidecar runs (`benchmarks/outage.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

from redis.asyncio import Redis

import agx
from agx.demo.finished_runs import FinishedRun, FinishedRuns
from agx.demo.run_view import RunView
from agx.demo.scenarios import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LOST,
    Scenario,
)
from agx.demo.traffic import Traffic
from agx.errors import AgxError

MIX = [COMPLETED] * 20 + [CANCELLED] * 5 + [FAILED] * 2 + [LOST]
PAUSE = (0.2, 1.5)  # seconds between two arrivals
GRACE = 5  # seconds that a shutdown gives to live runs
# An hour without a sidecar is 33,000 facts, half of them of one scope, which has an eighth of this.
QUEUE = 200_000  # facts


async def main() -> None:
    """Run scenarios until SIGTERM, then let the live runs end; runs whose process was killed are not waited for."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    url = os.environ["AGX_REDIS_URL"]
    async with Redis.from_url(url) as redis, asyncio.TaskGroup() as group:
        agx.configure(agx.Config(redis=redis, service_name="demo", queue_max_length=QUEUE))
        finished_runs = FinishedRuns()

        def forget(ran: FinishedRun) -> None:
            finished_runs.runs.clear()  # the sidecar counts; this list would only grow
            print(f"{ran.scope} {ran.agent} {ran.outcome} after {ran.seconds:.1f} s", flush=True)

        traffic = Traffic(url, None, finished_runs, on_begin=_ignore, on_end=forget)
        playing: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            playing = {task for task in playing if not task.done()}
            playing.add(group.create_task(_play(traffic, random.choice(random.choice(MIX)))))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(*PAUSE)):
                    await stop.wait()
        await agx.aclose(GRACE)
        for task in playing:
            task.cancel()


async def _play(traffic: Traffic, scenario: Scenario) -> None:
    """Run a scenario. One that fails does not end the service: without a sidecar nobody finalizes a lost run."""
    try:
        await traffic.play(scenario)
    except (AgxError, TimeoutError) as error:
        print(f"{scenario.agent}: {type(error).__name__}: {error}", flush=True)


def _ignore(view: RunView) -> None:
    pass


if __name__ == "__main__":
    asyncio.run(main())
