"""The scenes of durable runs: workers die, stall and are deployed, servers fail, and every run ends with its answer."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from redis.asyncio import Redis
from support.durable_worker import LEASE_TTL
from support.forked import Forked
from support.kill_points import KilledRun, count_steps, play, wrongs
from support.rigs import paused
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer

from .clients import open_client
from .durable_verdict import judge_durable
from .jobs import MOST_FACTS, POISON, Job, Jobs, serve
from .scenes import open_world
from .verdict import LEAST_CARE, SETTLE, Verdict
from .world import World

_WORKERS = 4
_SIDECARS = 2
_GRACE = 20.0  # seconds that a worker has at SIGTERM
_POINTS_PER_SECOND = 2.0
_BATCH = 40  # kill points that share the worker that goes on
_RUNS_PER_KILL = 10  # the goal: 100 kills of workers under 1,000 runs; a slow machine has fewer of both
_FULL = 60.0  # seconds of a scene from which on it has the numbers of the full table


@dataclass
class DurableWorld(World):
    """A world whose workers take jobs."""

    pids: dict[str, int] = field(default_factory=dict)  # of all workers that were started, by name

    def start_worker(self) -> None:
        self._names += 1
        name = f"w{self._names}"
        arguments = (self.worker_url, self.witness.directory, self.lease_ttl, self.slots, _GRACE)
        worker = Forked(serve, *arguments, log=self.home / f"{name}.log")
        self.workers[name] = worker
        self.pids[name] = worker.pid

    def died_ms(self) -> dict[int, float]:
        """Return when workers were killed, by pid: ms since the epoch."""
        to_epoch = time.time() - time.monotonic()
        return {self.pids[name]: (at + to_epoch) * 1_000 for name, at in self.killed_at.items()}

    async def deploy_worker(self) -> None:
        """Start a new worker and end the oldest one, as a rolling restart does."""
        self.faults["SIGTERM of a worker"] += 1
        self.start_worker()
        name = next(iter(self.workers))
        worker = self.workers.pop(name)
        await asyncio.to_thread(worker.end, signal.SIGTERM)

    async def replace_dead_workers(self) -> None:
        """Start a worker for each that has died, as an orchestrator does."""
        for name in [name for name, worker in self.workers.items() if worker.ended]:
            self.faults["worker killed by its job"] += 1
            del self.workers[name]
            self.start_worker()


async def kill_primary(world: World) -> None:
    """Kill a primary for good, and wait for its successor."""
    assert world.server is not None
    assert world.is_replaced is not None
    world.faults["primary killed"] += 1
    killed = time.monotonic()
    await asyncio.to_thread(world.server.kill)
    is_replaced = world.is_replaced
    await wait_until(lambda: asyncio.to_thread(is_replaced), what="the primary is replaced")
    world.times.append(f"replaced after {time.monotonic() - killed:.1f} s")


async def poison(world: World) -> None:
    """Submit a job that kills every worker that runs it."""
    jobs = world.witness
    assert isinstance(jobs, Jobs)
    world.faults["poison job"] += 1
    await jobs.submit(Job("poison", agent=POISON))


async def kill_worker(world: World) -> None:
    """Kill a worker as soon as enough runs have ended since the kill before."""
    least = _RUNS_PER_KILL * (world.faults["SIGKILL of a service"] + 1)
    while sum(not job.hangs for job in world.witness.heard.values()) < least:
        if time.monotonic() > world.ends:
            return
        await asyncio.sleep(0.05)
    await world.kill_worker()


async def stall_worker(world: World) -> None:
    """Hold a worker still for longer than its leases last, so that its runs are taken over; then let it go on."""
    name = world.chance.choice(sorted(world.workers))
    world.faults["SIGSTOP of a worker"] += 1
    with paused(world.workers[name].pid):
        await asyncio.sleep(world.lease_ttl * 2)


@dataclass(frozen=True)
class DurableScene:
    """Jobs, workers, and what strikes them.

    Args:
        jobs: at a time, in the full table; a tenth of them in the short form.
        once: one fault, then nothing more.
        max_pause: seconds between two events of a run that is taken over; None sets no bound.
        in_short: whether the short form plays it.
        spans_once: nothing strikes Redis or the sidecars, so no span may come twice.
    """

    name: str
    faults: Sequence[Callable[[Any], Awaitable[None]]]
    weight: float = 1.0
    least: float = 3.0  # seconds
    engine: Literal["single", "cluster", "sentinel"] = "single"
    every: tuple[float, float] = (0.5, 2.0)  # seconds between two faults
    once: bool = False
    jobs: int = 40
    most: int = 10**9
    lease_ttl: float = 2.0
    max_pause: float | None = None
    in_short: bool = False
    spans_once: bool = False

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Strike for so long, let everything settle, and judge."""
        verdict, chance = Verdict(self.name), Random(f"{seed}/{self.name}")
        at_a_time = max(20, int(self.jobs * min(1.0, seconds / _FULL)))
        slots = 2 * at_a_time // _WORKERS
        async with AsyncExitStack() as stack:
            world = await open_world(stack, self, home, chance, slots, kind=DurableWorld, witness=Jobs)
            jobs = world.witness
            assert isinstance(world, DurableWorld)
            assert isinstance(jobs, Jobs)
            client = open_client(world.url)
            stack.push_async_callback(client.aclose)
            agx.configure(agx.Config(redis=client, lease_ttl=self.lease_ttl, queue_max_length=MOST_FACTS))
            stack.push_async_callback(agx.aclose)
            stack.push_async_callback(jobs.stop)
            for _ in range(_SIDECARS):
                world.start_sidecar()
            for _ in range(_WORKERS):
                world.start_worker()
            jobs.under_way, jobs.most = at_a_time, max(at_a_time, int(self.most * min(1.0, seconds / _FULL)))
            await wait_until(lambda: len(jobs.live()) >= min(at_a_time, 10), what="jobs are under way")
            replacing = asyncio.create_task(_replace_dead(world))
            try:
                await self._strike(world, seconds)
                jobs.stop_submitting()
                await jobs.settle(2 * SETTLE)
            finally:
                replacing.cancel()
                await asyncio.gather(replacing, return_exceptions=True)
            verdict.broken += [f"{name} did not leave" for name in await world.finish_workers()]
            is_full = seconds >= _FULL  # in less time a few takeovers on a busy machine decide
            await judge_durable(
                verdict,
                world,
                jobs,
                died_ms=world.died_ms(),
                max_takeover=self.lease_ttl + LEAST_CARE if is_full else None,
                max_pause=self.max_pause if is_full else None,
                spans_once=self.spans_once,
                may_lose_jobs=self.engine != "single",
            )
            verdict.faults = world.faults
            verdict.times = world.times + verdict.times
        return verdict

    async def _strike(self, world: World, seconds: float) -> None:
        world.ends = time.monotonic() + seconds
        while time.monotonic() < world.ends:
            await asyncio.sleep(world.chance.uniform(*self.every))
            await world.chance.choice(self.faults)(world)
            if self.once:
                await asyncio.sleep(max(0.0, world.ends - time.monotonic()))


async def _replace_dead(world: DurableWorld) -> None:
    while True:
        await world.replace_dead_workers()
        await asyncio.sleep(0.2)


@dataclass(frozen=True)
class KillPointsScene:
    """A small run is killed at each step, each time another run; how many of the steps depends on the time."""

    name: str = "killed at every step"
    weight: float = 3.0
    least: float = 5.0
    in_short: bool = False

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Kill, go on, and judge each run."""
        verdict = Verdict(self.name)
        with EmbeddedServer() as server:
            async with Redis.from_url(server.url) as client:
                agx.configure(agx.Config(redis=client, lease_ttl=LEASE_TTL, retention=60))
                steps = await count_steps(server.url, home)
                stride = max(1, round(steps / (seconds * _POINTS_PER_SECOND)))
                points = range(1 + seed % stride, steps, stride)
                for start in range(0, len(points), _BATCH):
                    runs = [KilledRun(at, home) for at in points[start : start + _BATCH]]
                    await play(server.url, runs)
                    for run in runs:
                        verdict.faults["SIGKILL of a worker"] += run.was_killed
                        verdict.outcomes[run.events[-1]["body"].get("outcome", "none") if run.events else "none"] += 1
                        verdict.broken += await wrongs(run)
                await agx.aclose()
        verdict.times.append(f"{len(points)} of {steps} steps")
        return verdict


SCENES = (
    DurableScene(
        "durable: workers killed", [kill_worker], weight=6.0, every=(0.8, 4.0), in_short=True, spans_once=True
    ),
    DurableScene("durable: workers stalled", [stall_worker]),
    DurableScene("durable: server restarted", [World.restart_server], every=(1.5, 3.0)),
    DurableScene("durable: cluster failover", [kill_primary], engine="cluster", once=True, weight=0.5, lease_ttl=10.0),
    DurableScene(
        "durable: Sentinel failover", [kill_primary], engine="sentinel", once=True, weight=0.5, lease_ttl=10.0
    ),
    DurableScene("durable: poison job", [poison], once=True, jobs=50, most=200),
    DurableScene(
        "durable: rolling restart",
        [DurableWorld.deploy_worker],
        every=(0.2, 1.0),
        jobs=200,
        max_pause=1.0,
    ),
    KillPointsScene(),
)
