"""The engine of an event loop: its connections, group commit, queues, leases, hub and background tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from redis.exceptions import RedisError

from ..config import Config, describe_service
from ..facts.queues import Queues
from ..facts.schema import Reason
from ..redis.clock import ServerClock
from ..redis.cluster_bus import open_bus
from ..redis.keys import SessionKeys
from ..redis.meta import Meta
from ..redis.recovery_window import read_recovery_window
from ..redis.retry import Backoff
from ..redis.supervisor import Supervisor
from ..stream.hub import Hub
from ..stream.subscription import Subscription
from ..stream.write_side import AppendSettings, WriteSide
from .leases import Leases
from .meta_publisher import MetaPublisher
from .process_heartbeat import ProcessHeartbeat

logger = logging.getLogger("agx")

_CLOSING_TIME = 3.0  # seconds a sidecar has to close a run whose lease is gone
_DRAIN_TIME = 1.0  # seconds for the last facts, when the loop or the service shuts down
_READY_FIRST, _READY_LAST = 0.05, 2.0  # seconds between two attempts to read the number of partitions


class OpenSession(Protocol):
    """A session that is open in this process: it gives the session's events their order."""

    def put(self, type: str, origin: str, body: dict[str, Any]) -> None:
        """Append an event after those handed over before."""
        ...


class OpenRun(Protocol):
    """A run of this process that is not closed yet."""

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done when the run has emitted its last fact."""
        ...

    def cancel(self, reason: Reason, mark_ms: int | None) -> None:
        """Stop the run; the first reason holds."""
        ...


class Engine:
    """Group commit, queues, leases, hub and connections of one loop and one configuration."""

    def __init__(self, config: Config, *, on_closed: Callable[[Engine], None]) -> None:
        self.config = config
        self._on_closed = on_closed
        self.service = describe_service(config)
        self.clock = ServerClock()
        self.supervisor = Supervisor()
        # Appends never queue behind a lease or a read, so each kind has a connection of its own.
        self.appends = open_bus(config.redis, self._check_data)
        self.control = open_bus(config.redis, self._check_data)
        self._reads = open_bus(config.redis, self._check_data)
        settings = AppendSettings(config.max_stream_length, config.max_body, retain=config.lease_ttl)
        self.write_side = WriteSide(self.appends, self.clock, self.supervisor, settings)
        self.queues = Queues(
            self.appends,
            self.supervisor,
            config.key_prefix,
            max_length=config.queue_max_length,
            keep=config.lease_ttl,
        )
        self.meta = MetaPublisher(self.control, config.key_prefix, Meta(config.queue_partitions, config.lease_ttl))
        self.leases = Leases(
            self.control,
            config.key_prefix,
            self.clock,
            self.supervisor,
            self.meta,
            appends=self.appends,
            ttl=config.lease_ttl,
            on_data_lost=self._check_data,
        )
        self.subscription = Subscription(self._reads, self.supervisor)
        # A run that has only lost its lease takes it again within a third of its time; then a sidecar closes it.
        patience = config.lease_ttl / 3 + _CLOSING_TIME
        self.hub = Hub(self._reads, self.subscription, self.supervisor, patience=patience, poll_every=config.lease_ttl)
        self.runs: set[OpenRun] = set()  # until their last fact is emitted
        self.is_ending = False  # runs are handed over, and none is taken over
        # By stream: the object that orders the events of a session that is open in this loop.
        self.sessions: dict[str, OpenSession] = {}
        self.lines: dict[str, list[object]] = {}  # by stream: the runs that wait for a session, in their order
        self.heartbeat = ProcessHeartbeat(
            self.supervisor,
            self.service,
            queues=self.queues,
            write_side=self.write_side,
            hub=self.hub,
            is_live=lambda: bool(self.runs or self.hub.listeners),
        )
        self._background: set[asyncio.Task[None]] = set()
        self._readying: asyncio.Task[None] | None = None
        # A loop that shuts down closes its asynchronous generators: that is how it closes its engine. The loop finds a
        # generator from its first step on, and this step waits for nothing.
        self._keeper = self._keep()
        with contextlib.suppress(StopIteration):
            self._keeper.__anext__().send(None)

    async def ready(self) -> None:
        """Read the prefix's number of partitions; raises RedisError or OSError."""
        if self.queues.partitions is None:
            self.queues.partitions = await self.meta.publish()

    def ready_later(self) -> None:
        """Read the number of partitions in the background; until then facts wait in memory."""
        if self.queues.partitions is None and (self._readying is None or self._readying.done()):
            self._readying = self.supervisor.start(self._get_ready, name="agx-partitions")

    async def _get_ready(self) -> None:
        backoff = Backoff(_READY_FIRST, _READY_LAST)
        while True:
            try:
                return await self.ready()
            except (RedisError, OSError) as error:
                if not backoff.is_waiting:
                    logger.warning("agx: Redis can't be reached (%s), facts wait in memory", type(error).__name__)
                await asyncio.sleep(backoff.next())

    async def is_recoverable(self, session: SessionKeys) -> bool:
        """Return whether a session that no process holds has a run that another process can resume.

        Raises:
            RedisError, OSError: Redis did not answer.
        """
        now_ms, lease_ttl = self.clock.now_ms(), self.config.lease_ttl
        return await read_recovery_window(self.control, session, now_ms=now_ms, lease_ttl=lease_ttl) is not None

    def _check_data(self) -> None:
        """Check all retained data: a connection was opened, or data is missing, so the server may have lost more."""
        self.write_side.streams.check_all()
        self.queues.check_all()
        self.leases.refresh_soon()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Keep a reference to a task that outlives its caller."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _keep(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self._close_connections()

    async def end_runs(self, grace: float) -> None:
        """Wait `grace` seconds for the runs, then cancel them (reason `shutdown`); listeners still see their ends."""
        self.is_ending = True
        closed = {run.closed for run in self.runs}
        if closed and grace > 0:
            _, closed = await asyncio.wait(closed, timeout=grace)
        for run in list(self.runs):
            run.cancel("shutdown", None)
        if closed:
            await asyncio.wait(closed, timeout=self.config.lease_ttl)

    async def aclose(self, grace: float) -> None:
        """End the runs as `end_runs()` does, and close everything."""
        await self.end_runs(grace)
        if self._background:
            await asyncio.wait(set(self._background), timeout=self.config.lease_ttl)
        self.heartbeat.flush()
        await self._keeper.aclose()

    async def _close_connections(self) -> None:
        self.heartbeat.close()
        if self._readying is not None:
            self._readying.cancel()
        if self.queues.has_pending:
            # Runs without a session do not wait for their facts.
            with contextlib.suppress(TimeoutError, RedisError, OSError):
                async with asyncio.timeout(_DRAIN_TIME):
                    await self.ready()
                    await self.queues.drain()
        self.write_side.close()
        self.queues.close()
        self.leases.close()
        await self.hub.aclose()
        await self.subscription.aclose()
        for bus in (self.appends, self.control, self._reads):
            await bus.aclose()
        self._on_closed(self)
