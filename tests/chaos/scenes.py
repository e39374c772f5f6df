"""The scenes: which engine, and which faults strike it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from redis import Redis as SyncRedis
from support.otlp import OtlpReceiver
from support.proxy import Proxy
from support.rigs import cluster_rig, paused, sentinel_rig
from support.waiting import wait_until

import agx
from agx.server import EmbeddedServer

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
    """One row of the table."""

    name: str
    faults: Sequence[Fault]
    engine: Literal["single", "cluster", "sentinel"] = "single"
    every: tuple[float, float] = (0.3, 1.5)  # seconds between two faults
    cancels: bool = False
    once: bool = False  # the engine stands one such fault
    lease_ttl: float = 3.0
    sidecars: int = 2
    many: bool = False  # 200 runs at a time, where there is time for it


@asynccontextmanager
async def _engine(scene: Scene, home: Path, chance: Random, otlp: OtlpReceiver, slots: int) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        common = {"home": home, "chance": chance, "lease_ttl": scene.lease_ttl, "slots": slots, "otlp": otlp}
        if scene.engine == "cluster":
            cluster = stack.enter_context(cluster_rig())
            ports = [server.port for server in cluster.servers]
            world = World(
                url=cluster.url,
                worker_url=cluster.url,
                admins=lambda: _alive(ports),
                **common,  # type: ignore[arg-type]
            )
            world.server = cluster.servers[chance.randrange(3)]
        elif scene.engine == "sentinel":
            sentinel = stack.enter_context(sentinel_rig())
            world = World(
                url=sentinel.url, worker_url=sentinel.url,
                admins=lambda: [SyncRedis(port=sentinel.primary().port)], **common,  # type: ignore[arg-type]
            )  # fmt: skip
            world.server = sentinel.primary()
        else:
            data = home / "data"
            data.mkdir()
            server = EmbeddedServer(directory=data)
            server.start()
            stack.callback(server.stop)
            proxy = await stack.enter_async_context(Proxy(server.port))
            world = World(
                url=server.url, worker_url=proxy.url, admins=lambda: [SyncRedis(port=server.port)],
                server=server, proxy=proxy, **common,  # type: ignore[arg-type]
            )  # fmt: skip
        stack.callback(world.stop)
        yield world


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


async def play(scene: Scene, seconds: float, seed: int, home: Path) -> Verdict:
    """Play a scene: strike for so long, let everything settle, and judge."""
    verdict, chance = Verdict(scene.name), Random(f"{seed}/{scene.name}")
    slots = _MANY_SLOTS if scene.many and seconds >= _LONG else USUAL_SLOTS
    with OtlpReceiver() as otlp:
        async with _engine(scene, home, chance, otlp, slots) as world:
            client = open_client(world.url)
            agx.configure(agx.Config(redis=client, lease_ttl=scene.lease_ttl))
            for _ in range(scene.sidecars):
                world.start_sidecar()
            for _ in range(_WORKERS):
                world.start_worker()
            witness = Witness(world.ledgers)
            try:
                await wait_until(lambda: sum(heard.begun for heard in witness.heard.values()) >= slots)
                await _strike(scene, world, witness, seconds)
                verdict.broken += [f"{name} did not leave" for name in await world.finish_workers()]
                await witness.settle(SETTLE)
                heard = list(witness.heard.values())
                begun = judge_runs(verdict, heard, world.mortal, may_cancel=scene.cancels)
                await judge_told(verdict, world, begun)
            finally:
                await witness.stop()
                await agx.aclose()
                await client.aclose()
            verdict.faults = world.faults
    return verdict


async def _strike(scene: Scene, world: World, witness: Witness, seconds: float) -> None:
    cancelling = asyncio.create_task(_cancel_some(world, witness)) if scene.cancels else None
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await asyncio.sleep(world.chance.uniform(*scene.every))
        await world.chance.choice(scene.faults)(world)
        if scene.once:
            await asyncio.sleep(max(0.0, ends - time.monotonic()))
    if cancelling is not None:
        cancelling.cancel()
        await asyncio.gather(cancelling, return_exceptions=True)


async def _cancel_some(world: World, witness: Witness) -> None:
    while True:
        await asyncio.sleep(world.chance.uniform(0, 2 * _CANCEL_EVERY))
        live = [heard.session for heard in witness.heard.values() if heard.begun and heard.hangs]
        if live:
            session = world.chance.choice(live)
            try:
                await agx.cancel(scope_of(session), USER, session)
            except agx.RedisUnavailableError:
                continue
            world.faults["cancels"] += 1


async def kill_primary(world: World) -> None:
    """Kill a primary for good: a replica has to take over."""
    assert world.server is not None
    world.faults["primary killed"] += 1
    await asyncio.to_thread(world.server.kill)


async def stall_primary(world: World) -> None:
    """Hold a primary still until it is replaced; it comes back, and still takes itself for one."""
    assert world.server is not None
    world.faults["primary stalled"] += 1
    with paused(world.server.pid):
        await asyncio.sleep(6.0)


SCENES = (
    Scene("services killed", [World.kill_worker], every=(0.5, 3.0), cancels=True),
    Scene("services stalled", [World.stall_worker]),
    Scene("server restarted", [World.restart_server], every=(1.0, 2.5), many=True),
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
    ),
    Scene("memory full", [World.fill_memory], every=(0.5, 1.5)),
    Scene(
        "sidecars killed", [World.kill_sidecar, World.kill_sidecar, World.stall_sidecar], every=(0.5, 2.0), sidecars=3
    ),
    Scene("cluster failover", [kill_primary], engine="cluster", once=True, lease_ttl=10.0, many=True),
    Scene("Sentinel failover", [kill_primary], engine="sentinel", once=True, lease_ttl=10.0, many=True),
    Scene("cluster stall", [stall_primary], engine="cluster", once=True, lease_ttl=10.0),
    Scene("Sentinel stall", [stall_primary], engine="sentinel", once=True, lease_ttl=10.0),
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
        cancels=True,
    ),
)
