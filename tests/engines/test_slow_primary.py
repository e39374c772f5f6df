"""A primary is replaced while it is only slow: it comes back, believes that it still leads, and answers everybody.

Sentinel tells it only eight seconds later. What is written to it until then is lost, so nobody may stay with it.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from support.rigs import paused, sentinel_rig
from support.streaming import Streaming
from support.topologies import configured_on, sentinel_topology
from support.waiting import wait_until

RUNS = 50
LEASE_TTL = 3.0  # seconds, for which entries are retained: less than a demoted primary goes on


@pytest.mark.parametrize("least", [1, 5], ids=["while the runs begin", "while they stream"])
async def test_a_slow_primary_that_is_replaced_delays_and_nothing_more(least: int) -> None:
    with sentinel_rig() as rig:
        async with configured_on(sentinel_topology(rig), lease_ttl=LEASE_TTL):
            streaming = Streaming(RUNS)
            streaming.start()
            await wait_until(lambda: streaming.all_heard(least), 60, what="all listeners have events")
            slow = rig.primary()
            with paused(slow.pid):
                await wait_until(
                    lambda: asyncio.to_thread(lambda: rig.primary() is not slow), what="another server leads"
                )
            back = time.monotonic()
            before = {name: len(said) for name, said in streaming.said.items()}
            await wait_until(lambda: streaming.have_heard_since(before), 60, what="all listeners hear again")
            print(f"all runs had gone on after {time.monotonic() - back:.1f} s")
            # Until the former primary follows the new one.
            await wait_until(lambda: asyncio.to_thread(rig.is_whole), 60, what="the former primary follows")
            await streaming.finish()
            await streaming.replay()
