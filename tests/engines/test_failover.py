"""A primary is killed while 200 runs stream: none fails, none is lost, no listener misses or repeats an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from support.agents import FakeSession, ScopeDeps
from support.replica import Replica
from support.rigs import cluster_rig, sentinel_rig
from support.topologies import Topology, cluster_topology, configured_on, sentinel_topology
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer

RUNS = 200
KEY = "agx:t1:1:s1"  # of one of them
PACE = 0.25  # seconds between two words of a run


class Streaming:
    """Many runs that talk until `finish()`, each with a listener."""

    def __init__(self) -> None:
        self._finish = asyncio.Event()
        self.said: dict[str, list[str]] = {}
        self.heard: dict[str, list[dict[str, Any]]] = {}
        self._runs: list[asyncio.Task[Any]] = []
        self._listeners: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for n in range(RUNS):
            name = f"s{n}"
            said, heard = self.said.setdefault(name, []), self.heard.setdefault(name, [])
            deps = ScopeDeps(scope=f"t{n % 7}", session_id=name)
            self._runs.append(asyncio.create_task(agx.run(FakeSession(), self._agent(said), "Hi", deps=deps)))
            self._listeners.append(asyncio.create_task(self._listen(deps, heard)))

    def _agent(self, said: list[str]) -> Agent[ScopeDeps, str]:
        async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
            while not self._finish.is_set():
                said.append(f"{len(said)} ")
                yield said[-1]
                await asyncio.sleep(PACE)

        return Agent(FunctionModel(stream_function=speak), deps_type=ScopeDeps, name="talker")

    async def _listen(self, deps: ScopeDeps, heard: list[dict[str, Any]]) -> None:
        async for event in agx.listen(deps.scope, deps.user_id, deps.session_id, wait=30, serialize=False):
            heard.append(event)  # noqa: PERF401 - the test looks at it meanwhile

    def all_heard(self, least: int) -> bool:
        return all(len(heard) >= least for heard in self.heard.values())

    def have_heard_since(self, before: dict[str, int]) -> bool:
        """Whether every listener has heard words that were said after that many."""
        return all(
            any(int(text.split()[-1]) > before[name] + 1 for text in _texts(heard[-50:]))
            for name, heard in self.heard.items()
        )

    async def finish(self) -> None:
        """End all runs; fails unless each is whole."""
        self._finish.set()
        for name, result in zip(self.said, await asyncio.gather(*self._runs), strict=True):
            assert result.output == "".join(self.said[name])
        await asyncio.gather(*self._listeners)
        for name, heard in self.heard.items():
            assert [event["body"]["seq"] for event in heard] == list(range(len(heard))), name
            assert heard[-1]["body"]["outcome"] == "completed"
            assert "".join(_texts(heard)) == "".join(self.said[name])


def _texts(events: list[dict[str, Any]]) -> list[str]:
    bodies = [event["body"] for event in events if "part_kind" in event["body"]]
    return [body.get("content_delta", body.get("content", "")) for body in bodies]


async def fail_over(
    topology: Topology, home: Path, victim: EmbeddedServer, successor: Callable[[], EmbeddedServer | None]
) -> str:
    """Kill a primary under 200 runs; returns the seconds until it was replaced, and until every run had gone on."""
    sidecar = Replica(home / "sidecar", **topology.environment)
    try:
        streaming = Streaming()
        streaming.start()
        await wait_until(lambda: streaming.all_heard(5), 60, what="all listeners hear")
        victim.kill()
        killed = time.monotonic()
        before = {name: len(said) for name, said in streaming.said.items()}

        await wait_until(lambda: asyncio.to_thread(lambda: successor() not in (None, victim)))
        replaced = time.monotonic() - killed
        await wait_until(lambda: streaming.have_heard_since(before))
        took = time.monotonic() - killed
        await streaming.finish()

        def counted() -> bool:
            scraped = sidecar.scrape()
            completed = scraped.total("agx_runs_total", outcome="completed")
            return completed == RUNS == scraped.total("agx_runs_started_total") == scraped.total("agx_runs_total")

        await wait_until(lambda: asyncio.to_thread(counted), what="all runs are counted as completed")
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
