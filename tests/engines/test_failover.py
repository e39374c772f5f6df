"""A primary is killed while 200 runs stream: none fails, none is lost, no listener misses or repeats an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from support.replica import Replica
from support.rigs import cluster_rig, sentinel_rig
from support.streaming import Streaming
from support.topologies import Topology, cluster_topology, configured_on, sentinel_topology
from support.waiting import wait_until

from agx.embedded.server import EmbeddedServer

RUNS = 200
KEY = "agx:t1:1:s1"  # of one of them


async def fail_over(
    topology: Topology, home: Path, victim: EmbeddedServer, successor: Callable[[], EmbeddedServer | None]
) -> str:
    """Kill a primary under 200 runs; returns the seconds until it was replaced, and until every run had gone on."""
    sidecar = Replica(home / "sidecar", **topology.environment)
    try:
        streaming = Streaming(RUNS)
        streaming.start()
        await wait_until(lambda: streaming.all_heard(5), 60, what="all listeners hear")
        victim.kill()
        killed = time.monotonic()
        before = {name: len(said) for name, said in streaming.said.items()}

        await wait_until(lambda: asyncio.to_thread(lambda: successor() not in (None, victim)))
        replaced = time.monotonic() - killed
        await wait_until(lambda: streaming.have_heard_since(before), 60, what="all listeners hear again")
        took = time.monotonic() - killed
        await streaming.finish()

        def counted() -> bool:
            scraped = sidecar.scrape()
            completed = scraped.total("agx_runs_total", outcome="completed")
            return completed == RUNS == scraped.total("agx_runs_started_total") == scraped.total("agx_runs_total")

        await wait_until(lambda: asyncio.to_thread(counted), 60, what="all runs are counted as completed")
        assert "Traceback" not in sidecar.log
        return f"replaced after {replaced:.1f} s, all runs had gone on after {took:.1f} s"
    finally:
        sidecar.end()


async def test_cluster_failover(tmp_path: Path) -> None:
    with cluster_rig() as rig:
        topology = cluster_topology(rig)
        async with configured_on(topology):
            took = await fail_over(topology, tmp_path, rig.primary_of(KEY), lambda: rig.primary_of(KEY))
    print(f"cluster: {took}")


async def test_sentinel_failover(tmp_path: Path) -> None:
    with sentinel_rig() as rig:
        topology = sentinel_topology(rig)
        async with configured_on(topology):
            took = await fail_over(topology, tmp_path, rig.primary(), rig.primary)
    print(f"Sentinel: {took}")
