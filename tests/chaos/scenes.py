"""The scenes: which engine, and which faults strike it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, Protocol
from urllib.parse import urlsplit

from redis import Redis as SyncRedis
from support.otlp import OtlpReceiver
from support.proxy import Proxy
from support.rigs import cluster_rig, paused, sentinel_rig
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer

from .clients import open_client
from .plan import scope_of
from .verdict import SETTLE, Verdict, judge_runs, judge_told
from .witness import Witness
from .worker import USER, USUAL_SLOTS
from .world import World

Fault = Callable[[World], Awaitable[None]]
_WORKERS = 3
_MANY_SLOTS, _LONG = 67, 25.0  # runs a worker, from so many seconds a scene on
_CANCEL_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Scene:
    """One row of the table: runs of real services, and what strikes them meanwhile."""

    name: str
    faults: Sequence[Fault]
    weight: float = 1.0  # its part of the time
    least: float = 0.0  # seconds
    engine: Literal["single", "cluster", "sentinel"] = "single"
    every: tuple[float, float] = (0.3, 1.5)  # seconds between two faults
    cancels: bool = False
    once: bool = False  # the engine stands one such fault
    lease_ttl: float = 3.0
    sidecars: int = 2
    many: bool = False  # 200 runs at a time, where there is time for it
    in_short: bool = True
    spans_once: bool = False  # nobody comes back, and nothing strikes Redis or the sidecars: no span may come twice

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Strike for so long, let everything settle, and judge."""
        verdict, chance = Verdict(self.name), Random(f"{seed}/{self.name}")
        slots = _MANY_SLOTS if self.many and seconds >= _LONG else USUAL_SLOTS
        async with AsyncExitStack() as stack:
            world = await open_world(stack, self, home, chance, slots)
            client = open_client(world.url)
            stack.push_async_callback(client.aclose)
            agx.configure(agx.Config(redis=client, lease_ttl=self.lease_ttl))
            stack.push_async_callback(agx.aclose)
            stack.push_async_callback(world.witness.stop)
            for _ in range(self.sidecars):
                world.start_sidecar()
            for _ in range(_WORKERS):
                world.start_worker()
            await wait_until(lambda: sum(heard.begun for heard in world.witness.heard.values()) >= slots)
            await _strike(self, world, seconds)
            verdict.broken += [f"{name} did not leave" for name in await world.finish_workers()]
            await world.witness.settle(SETTLE)
            begun = judge_runs(verdict, world, may_cancel=self.cancels)
            await judge_told(verdict, world, begun, spans_once=self.spans_once)
            verdict.faults = world.faults
            verdict.times += world.times
        return verdict


class EngineChoice(Protocol):
    """What a scene says of its engine."""

    @property
    def engine(self) -> Literal["single", "cluster", "sentinel"]: ...
    @property
    def lease_ttl(self) -> float: ...
    @property
    def spans_once(self) -> bool: ...


async def open_world(
    stack: AsyncExitStack,
    scene: EngineChoice,
    home: Path,
    chance: Random,
    slots: int,
    *,
    kind: type[World] = World,
    witness: Callable[[Path], Witness] = Witness,
) -> World:
    """Start an engine, a collector and a witness; workers and sidecars are the scene's to start."""
    otlp = stack.enter_context(OtlpReceiver())
    collector = await stack.enter_async_context(Proxy(urlsplit(otlp.endpoint_http).port or 0))
    ledgers = home / "ledgers"
    ledgers.mkdir()
    common = {
        "home": home, "chance": chance, "lease_ttl": scene.lease_ttl, "slots": slots, "otlp": otlp,
        "collector": collector, "witness": witness(ledgers), "claim_idle": 60.0 if scene.spans_once else 1.0,
    }  # fmt: skip
    if scene.engine == "cluster":
        cluster = stack.enter_context(cluster_rig())
        ports = [server.port for server in cluster.servers]
        world = kind(
            url=cluster.url, worker_url=cluster.url, admins=lambda: _alive(ports),
            is_replaced=lambda: len(cluster.primaries()) == 3, server=cluster.servers[chance.randrange(3)],
            **common,  # type: ignore[arg-type]
        )  # fmt: skip
    elif scene.engine == "sentinel":
        sentinel = stack.enter_context(sentinel_rig())
        primary = sentinel.primary()
        world = kind(
            url=sentinel.url, worker_url=sentinel.url, admins=lambda: [SyncRedis(port=sentinel.primary().port)],
            is_replaced=lambda: sentinel.primary() is not primary, server=primary,
            **common,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        data = home / "data"
        data.mkdir()
        server = EmbeddedServer(directory=data)
        server.start()
        stack.callback(server.stop)
        proxy = await stack.enter_async_context(Proxy(server.port))
        world = kind(
            url=server.url, worker_url=proxy.url, admins=lambda: [SyncRedis(port=server.port)],
            server=server, proxy=proxy, **common,  # type: ignore[arg-type]
        )  # fmt: skip
    stack.callback(world.stop)
    return world


def _alive(ports: Sequence[int]) -> list[SyncRedis]:
    """Return clients of the primaries that answer."""
    clients = []
    for port in ports:
        client = SyncRedis(port=port)
        try:
            if client.info("replication")["role"] == "master":
                clients.append(client)
        except OSError:
            client.close()
        except Exception:
            client.close()
    return clients


async def _strike(scene: Scene, world: World, seconds: float) -> None:
    cancelling = asyncio.create_task(_cancel_some(world)) if scene.cancels else None
    world.ends = time.monotonic() + seconds
    while time.monotonic() < world.ends:
        await asyncio.sleep(world.chance.uniform(*scene.every))
        await world.chance.choice(scene.faults)(world)
        if scene.once:
            await asyncio.sleep(max(0.0, world.ends - time.monotonic()))
    if cancelling is not None:
        cancelling.cancel()
        await asyncio.gather(cancelling, return_exceptions=True)


async def _cancel_some(world: World) -> None:
    while True:
        await asyncio.sleep(world.chance.uniform(0, 2 * _CANCEL_EVERY))
        if live := world.witness.live():
            session = world.chance.choice(live).session
            try:
                await agx.cancel(scope_of(session), USER, session)
            except agx.RedisUnavailableError:
                continue
            world.faults["cancels"] += 1


async def kill_primary(world: World) -> None:
    """Kill a primary for good: a replica has to take over, and every run to go on."""
    assert world.server is not None
    assert world.is_replaced is not None
    world.faults["primary killed"] += 1
    killed = time.monotonic()
    await asyncio.to_thread(world.server.kill)
    is_replaced = world.is_replaced
    await wait_until(lambda: asyncio.to_thread(is_replaced), what="the primary is replaced")
    replaced = time.monotonic() - killed
    heard = [(one, len(one.seqs)) for one in world.witness.live()]
    await wait_until(lambda: all(len(one.seqs) > before for one, before in heard if one.hangs), what="all runs go on")
    went_on = time.monotonic() - killed
    world.times.append(f"replaced after {replaced:.1f} s, all {len(heard)} runs had gone on after {went_on:.1f} s")


async def stop_collector(world: World) -> None:
    """Have no collector until the scene's time is over: the metrics must not notice."""
    world.faults["collector down"] += 1
    began = time.monotonic()
    world.collector.refuse()
    await asyncio.sleep(max(0.0, world.ends - time.monotonic()))
    ended = sum(heard.outcome is not None for heard in world.witness.heard.values())
    asked = time.monotonic()
    await wait_until(lambda: asyncio.to_thread(_counted, world, ended), what=f"{ended} runs counted meanwhile")
    counted = time.monotonic() - asked
    world.times.append(f"down for {asked - began:.0f} s; {ended} runs ended meanwhile, counted {counted:.1f} s later")
    world.collector.accept()


def _counted(world: World, least: int) -> bool:
    return any(sidecar.scrape().total("agx_runs_total") >= least for sidecar in world.sidecars)


async def stall_primary(world: World) -> None:
    """Hold a primary still until it is replaced; it comes back, and still takes itself for one."""
    assert world.server is not None
    world.faults["primary stalled"] += 1
    with paused(world.server.pid):
        await asyncio.sleep(6.0)


SCENES = (
    Scene("services killed", [World.kill_worker], weight=1.5, every=(0.3, 2.0), cancels=True, spans_once=True),
    Scene("services stalled", [World.stall_worker]),
    Scene("server restarted", [World.restart_server], weight=1.25, every=(1.0, 2.5), many=True),
    Scene(
        "connections",
        [
            World.cut_connections,
            World.lose_replies,
            World.refuse_connections,
            World.slow_connections,
            World.freeze_connections,
        ],
        every=(0.1, 0.7),
        lease_ttl=10.0,  # longer than several of them in a row
    ),
    Scene("memory full", [World.fill_memory], weight=0.75, every=(0.5, 1.5)),
    Scene(
        "sidecars killed", [World.kill_sidecar, World.kill_sidecar, World.stall_sidecar], every=(0.5, 2.0), sidecars=3
    ),
    Scene("cluster failover", [kill_primary], weight=0.5, engine="cluster", once=True, lease_ttl=10.0, many=True),
    Scene("Sentinel failover", [kill_primary], weight=0.5, engine="sentinel", once=True, lease_ttl=10.0, many=True),
    Scene("cluster stall", [stall_primary], weight=0.5, engine="cluster", once=True, lease_ttl=10.0),
    Scene("Sentinel stall", [stall_primary], weight=0.5, engine="sentinel", once=True, lease_ttl=10.0),
    Scene("collector down", [stop_collector], weight=5.0, least=20.0, once=True),
    Scene(
        "everything",
        [
            World.kill_worker,
            World.stall_worker,
            World.restart_server,
            World.kill_sidecar,
            World.cut_connections,
            World.lose_replies,
            World.freeze_connections,
            World.fill_memory,
        ],
        weight=1.5,
        cancels=True,
        lease_ttl=6.0,
    ),
)
