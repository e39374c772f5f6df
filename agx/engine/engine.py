"""The engine: what belongs to one running event loop; made on first use, closed by `aclose()` or with the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

from redis.exceptions import RedisError

from ..config import Config, current_config, describe_service
from ..facts import schema as facts
from ..facts.queues import Queues
from ..redis import keys
from ..redis.clock import ServerClock
from ..redis.cluster_bus import open_bus
from ..stream.group_commit import GroupCommit
from ..stream.hub import Hub
from ..stream.subscription import Subscription
from .leases import Leases

_CLOSING_TIME = 3.0  # seconds a sidecar has to close a run whose lease is gone
_BEAT = 10.0  # seconds between `process` facts while anything is live


class OpenSession(Protocol):
    """A session that is open in this process: it gives the session's events their order."""

    def put(self, type: str, origin: str, body: dict[str, Any]) -> None:
        """Append an event behind those handed over before."""
        ...


class OpenRun(Protocol):
    """A live run of this process."""

    def cancel(self, reason: facts.Reason, mark_ms: int | None) -> None:
        """Stop the run; the first reason holds."""
        ...


class Engine:
    """Group commit, queues, leases, hub and connections of one loop and one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.service = describe_service(config)
        self.clock = ServerClock()
        # Appends never queue behind a lease or a read, so each kind has a connection of its own.
        self.appends = open_bus(config.redis, self._on_break)
        self.control = open_bus(config.redis, self._on_break)
        self._reads = open_bus(config.redis, self._on_break)
        self.writer = GroupCommit(
            self.appends, max_length=config.max_stream_length, max_body=config.max_body, keep=config.lease_ttl
        )
        self.queues = Queues(self.appends, config.key_prefix, max_length=config.queue_max_length, keep=config.lease_ttl)
        self.leases = Leases(self.control, config.key_prefix, self.clock, ttl=config.lease_ttl)
        # A run that had only lost its lease takes it again within a third of its time; then a sidecar closes it.
        self.subscription = Subscription(self._reads)
        self.hub = Hub(self._reads, self.subscription, patience=config.lease_ttl / 3 + _CLOSING_TIME)
        self.recorders: set[OpenRun] = set()  # the live runs of this loop
        # By stream, who gives the events of a session that is open here their order.
        self.sessions: dict[str, OpenSession] = {}
        self.runs: set[asyncio.Future[None]] = set()  # done when the run has returned or raised
        self._background: set[asyncio.Task[None]] = set()
        self._meta: asyncio.Task[int] | None = None
        self._beats: asyncio.Task[None] | None = None
        self._beat_count = 0
        self._beaten_gaps = self._beaten_rereads = 0
        # A loop that shuts down closes its asynchronous generators: that is how it closes its engine. The first step
        # makes the loop take note of it, and has nothing to wait for.
        self._keeper = self._keep()
        with contextlib.suppress(StopIteration):
            self._keeper.__anext__().send(None)

    async def ready(self) -> None:
        """Make sure that the prefix's number of partitions is known; raises RedisError or OSError."""
        if self.queues.partitions is None:
            self.queues.partitions = await self.leases.publish_meta(self.config.queue_partitions)

    def _on_break(self) -> None:
        """A connection was opened, again or to another server: what had been acknowledged may be gone with the last."""
        self.writer.check_all()
        self.queues.check_all()
        self.leases.refresh_soon()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Keep a reference to a task that outlives its caller."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def start_beats(self) -> None:
        """Send `process` facts while anything is live."""
        if self._beats is None:
            self._beats = asyncio.get_running_loop().create_task(self._beat(), name="agx-beats")

    async def _beat(self) -> None:
        try:
            while self.recorders or self.hub.listeners:
                await asyncio.sleep(_BEAT)
                self._put_beat()
        finally:
            self._beats = None

    def _put_beat(self) -> None:
        self._beat_count += 1
        stats, now = self.writer.stats, time.monotonic()
        silence = max((now - session.last_put for session in self.writer.sessions), default=0.0)
        self.queues.put(
            facts.ProcessBeat(
                id=f"{self.service.instance}:{id(self):x}:{self._beat_count}",
                at_ns=time.time_ns(),
                service=self.service,
                listeners=self.hub.listeners,
                buffered_events=self.writer.buffered_events,
                silence_ns=int(silence * 1e9),
                gaps=self.hub.gaps - self._beaten_gaps,
                rereads=self.hub.rereads - self._beaten_rereads,
                append_counts=tuple(stats.counts),
                append_sum_ns=stats.sum_ns,
            )
        )
        self._beaten_gaps, self._beaten_rereads = self.hub.gaps, self.hub.rereads
        stats.reset()

    async def _keep(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self._close_connections()

    async def end_runs(self, grace: float) -> None:
        """Wait `grace` seconds for the runs, then cancel them (reason `shutdown`); listeners still see their ends."""
        runs = set(self.runs)
        if runs and grace > 0:
            _, runs = await asyncio.wait(runs, timeout=grace)
        for recorder in list(self.recorders):
            recorder.cancel("shutdown", None)
        if runs:
            await asyncio.wait(runs, timeout=self.config.lease_ttl)

    async def aclose(self, grace: float) -> None:
        """End the runs as `end_runs()` does, and close everything."""
        await self.end_runs(grace)
        if self._background:
            await asyncio.wait(set(self._background), timeout=self.config.lease_ttl)
        if self._beats is not None:
            self._put_beat()
        if self.queues.partitions is not None:
            with contextlib.suppress(TimeoutError, RedisError, OSError):
                async with asyncio.timeout(1.0):
                    await self.queues.drain()
        await self._keeper.aclose()

    async def _close_connections(self) -> None:
        if self._beats is not None:
            self._beats.cancel()
        self.writer.close()
        self.queues.close()
        self.leases.close()
        await self.hub.aclose()
        await self.subscription.aclose()
        for bus in (self.appends, self.control, self._reads):
            await bus.aclose()
        with _lock:
            for engines in _engines.values():
                if self in engines:
                    engines.remove(self)


_engines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[Engine]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_forked: list[object] = []


def current_engine() -> Engine:
    """Return the running loop's engine for the current configuration; raises NotConfiguredError."""
    config = current_config()
    loop = asyncio.get_running_loop()
    with _lock:
        engines = _engines.setdefault(loop, [])
        for engine in engines:
            if engine.config is config:
                return engine
        engine = Engine(config)
        engines.append(engine)
        return engine


async def aclose(grace: float = 0) -> None:
    """End the running event loop's runs and close its connections; for the service's shutdown.

    Cancelled runs are saved and their streams ended. Whoever uses agx again afterwards gets new connections.

    Args:
        grace: seconds that live runs have left; then they are cancelled with reason `shutdown`.
    """
    with _lock:
        engines = _engines.pop(asyncio.get_running_loop(), [])
    for engine in engines:
        await engine.aclose(grace)


# Runs that have been entered in this process and whose `begin` is not yet appended, by stream: a listener that comes
# right behind `create_task(run(...))` waits for that run instead of replaying the one before.
_starting: dict[str, list[Future[None]]] = {}


@contextlib.contextmanager
def starting(session: keys.SessionKeys) -> Iterator[None]:
    """Mark a run as entered; the block ends when its `begin` is appended, or can't be."""
    done: Future[None] = Future()
    with _lock:
        _starting.setdefault(session.stream, []).append(done)
    try:
        yield
    finally:
        with _lock:
            entered = _starting[session.stream]
            entered.remove(done)
            if not entered:
                del _starting[session.stream]
        done.set_result(None)


async def wait_for_starting(session: keys.SessionKeys) -> None:
    """Wait for the `begin` of a run that has been entered in this process, if there is one."""
    await asyncio.sleep(0)  # a task made just before takes its first step here
    with _lock:
        entered = list(_starting.get(session.stream, ()))
    for done in entered:
        await asyncio.wrap_future(done)


def _leave_to_parent() -> None:
    # The child must not even close what the parent uses: the sockets are shared.
    _forked.append((dict(_engines), dict(_starting)))
    _engines.clear()
    _starting.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
