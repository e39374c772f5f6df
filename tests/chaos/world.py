"""The world of a scene: an engine, workers behind a proxy, sidecars, a collector; and what can be done to them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from redis import Redis as SyncRedis
from support.forked import Forked
from support.otlp import OtlpReceiver
from support.proxy import Proxy
from support.replica import Replica
from support.rigs import paused

from agx.embedded.server import EmbeddedServer

from .witness import Witness
from .worker import work


@dataclass
class World:
    """What a scene works on. `admins` gives clients that together see every key."""

    home: Path
    chance: Random
    url: str  # for sidecars and listeners
    worker_url: str  # for workers; a proxy's, where there is one
    lease_ttl: float
    slots: int
    admins: Callable[[], list[SyncRedis]]
    otlp: OtlpReceiver
    collector: Proxy  # before `otlp`, for the sidecars
    witness: Witness
    claim_idle: float  # seconds after which a sidecar takes another's spans for its own to export
    server: EmbeddedServer | None = None
    proxy: Proxy | None = None
    is_replaced: Callable[[], bool] | None = None  # whether a killed primary has its successor
    faults: Counter[str] = field(default_factory=Counter)
    ends: float = 0.0  # monotonic, when nothing strikes any more
    times: list[str] = field(default_factory=list)  # what was measured, for the table
    workers: dict[str, Forked] = field(default_factory=dict)
    with_sdk: set[str] = field(default_factory=set)
    killed_at: dict[str, float] = field(default_factory=dict)  # workers; monotonic
    mortal: set[str] = field(default_factory=set)  # workers whose runs may be lost: killed, or stalled too long
    sidecars: list[Replica] = field(default_factory=list)
    _names: int = 0
    _sdk_is_next: bool = False

    def start_worker(self) -> None:
        """Start a service; every other one has an OpenTelemetry SDK."""
        self._names += 1
        name, has_sdk = f"w{self._names}", self._sdk_is_next
        self._sdk_is_next = not has_sdk
        if has_sdk:
            self.with_sdk.add(name)
        ledger = self.witness.directory / f"{name}.ledger"
        endpoint = self.otlp.endpoint_http if has_sdk else None
        arguments = (self.worker_url, ledger, name, self.slots, self.lease_ttl, endpoint)
        self.workers[name] = Forked(work, *arguments, log=self.home / f"{name}.log")

    def start_sidecar(self) -> None:
        self._names += 1
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.collector.port}",
            "AGX_CLAIM_IDLE": str(self.claim_idle),
        }
        self.sidecars.append(Replica(self.home / f"sidecar{self._names}", self.url, **environment))

    # --- faults ---

    async def kill_worker(self) -> None:
        name, worker = self._any_worker()
        self.faults["SIGKILL of a service"] += 1
        self.mortal.add(name)
        del self.workers[name]
        self.killed_at[name] = time.monotonic()
        await asyncio.to_thread(worker.end, signal.SIGKILL)
        self.start_worker()

    async def stall_worker(self) -> None:
        """Hold a service still for longer than its leases last."""
        name, worker = self._any_worker()
        self.faults["SIGSTOP of a service"] += 1
        self.mortal.add(name)
        with paused(worker.pid):
            await asyncio.sleep(self.lease_ttl * 1.5)

    def _any_worker(self) -> tuple[str, Forked]:
        name = self.chance.choice(sorted(self.workers))
        return name, self.workers[name]

    async def kill_sidecar(self) -> None:
        self.faults["SIGKILL of a sidecar"] += 1
        sidecar = self.chance.choice(self.sidecars)
        self.sidecars.remove(sidecar)
        await asyncio.to_thread(sidecar.end, signal.SIGKILL)
        self.start_sidecar()

    async def stall_sidecar(self) -> None:
        self.faults["SIGSTOP of a sidecar"] += 1
        with paused(self.chance.choice(self.sidecars).child.pid):
            await asyncio.sleep(2.5)

    async def restart_server(self) -> None:
        assert self.server is not None
        self.faults["server killed and restarted"] += 1
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(self.chance.uniform(0.0, 1.0))
        await asyncio.to_thread(self.server.start)

    async def cut_connections(self) -> None:
        assert self.proxy is not None
        self.faults["connections cut"] += 1
        self.proxy.cut()

    async def lose_replies(self) -> None:
        assert self.proxy is not None
        self.faults["replies lost"] += 1
        self.proxy.lose_replies(self.chance.randint(1, 3))

    async def refuse_connections(self) -> None:
        assert self.proxy is not None
        self.faults["connections refused"] += 1
        self.proxy.refuse()
        await asyncio.sleep(self.chance.uniform(0.1, 1.5))
        self.proxy.accept()

    async def slow_connections(self) -> None:
        assert self.proxy is not None
        self.faults["connections slowed"] += 1
        self.proxy.delay = self.chance.uniform(0.02, 0.3)
        await asyncio.sleep(self.chance.uniform(0.3, 1.0))
        self.proxy.delay = 0.0

    async def freeze_connections(self) -> None:
        assert self.proxy is not None
        self.faults["network frozen"] += 1
        self.proxy.freeze()
        await asyncio.sleep(self.chance.uniform(0.3, 2.0))
        self.proxy.thaw()

    async def fill_memory(self) -> None:
        """Leave the server no memory for a while."""
        self.faults["memory full"] += 1
        for admin in self.admins():
            with admin:
                admin.config_set("maxmemory", "1mb")
        await asyncio.sleep(self.chance.uniform(0.5, 2.0))
        for admin in self.admins():
            with admin:
                admin.config_set("maxmemory", "0")

    # --- the end ---

    async def finish_workers(self) -> list[str]:
        """Have every service end its runs and leave; returns those that did not do so in time."""
        for worker in self.workers.values():
            worker.send(signal.SIGTERM)
        late = []
        for name, worker in self.workers.items():
            for _ in range(600):
                if worker.ended:
                    break
                await asyncio.sleep(0.1)
            else:
                late.append(name)
            await asyncio.to_thread(worker.end, signal.SIGKILL)
        return late

    def stop(self) -> None:
        """End what still runs, however the scene ended."""
        for sidecar in self.sidecars:
            if sidecar.alive:
                sidecar.end()
        for worker in self.workers.values():
            worker.end(signal.SIGKILL)
