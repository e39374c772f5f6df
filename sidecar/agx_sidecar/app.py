"""Connects the parts of one replica (link, sinks, reaper, pages), and stops them in order on SIGTERM.

Parts that most replicas do not need are imported where they are created: their import takes as long as all others.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from agx import __version__
from agx.engine.signals import stop_on_signals

from .health import Health
from .http import HttpServer
from .link import Link, open_client
from .meta import PartitionsChangedError, wait_for_meta, watch_meta
from .metrics.series import Series
from .metrics.sink import MetricsSink, leaf_of
from .pages import Pages
from .recovery.reaper import Reaper
from .replica_metrics import zero_initialize
from .settings import Settings
from .source import decode_fact, make_caching_decoder

if TYPE_CHECKING:
    from .console.app import ConsoleServer
    from .push.pusher import MetricsPush
    from .traces.export import Export
    from .traces.sink import TracesSink

logger = logging.getLogger(__name__)

_COLLECT_AFTER = 20_000  # new objects, between two collections
_QUIET = 1.0  # seconds without a reply after which something is sent


class Sidecar:
    """One replica."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._own = Series()
        self._link = Link(open_client(settings.redis))
        self._health = Health(self._link)
        self._metrics: MetricsSink | None = None
        self._traces: TracesSink | None = None
        self._export: Export | None = None
        self._reaper = Reaper(self._link, settings.prefix)
        decode = make_caching_decoder() if len(settings.sinks) > 1 else decode_fact
        if "metrics" in settings.sinks:
            self._metrics = MetricsSink(self._link, settings.prefix, settings.lease, self._own, decode=decode)
        if "traces" in settings.sinks:
            from .traces.export import Export  # noqa: PLC0415 - see the module's docstring
            from .traces.otlp import open_transport  # noqa: PLC0415
            from .traces.sink import TracesSink  # noqa: PLC0415

            self._export = Export(open_transport(settings), self._own, settings.otlp_timeout)
            self._traces = TracesSink(
                self._link, settings.prefix, self._export, self._own, settings.claim_idle, decode=decode
            )
            self._traces.counts_malformed = self._metrics is None
            self._traces.semconv = settings.semconv
        self._push: MetricsPush | None = None
        if settings.push is not None:
            from .push.pusher import MetricsPush  # noqa: PLC0415

            self._push = MetricsPush(
                settings.push,
                settings.prefix,
                link=self._link,
                own=self._own,
                metrics=self._metrics,
                semconv=settings.semconv,
            )
        pages = Pages(self._health, self._link, self._own, self._metrics, semconv=settings.semconv)
        self._pages = HttpServer(
            settings.http_host, settings.http_port, pages.make_app(), port_variable="AGX_HTTP_PORT"
        )
        self._console: ConsoleServer | None = None
        if settings.console is not None:
            from .console.app import ConsoleServer  # noqa: PLC0415

            self._console = ConsoleServer(settings, settings.console)
        zero_initialize(self._own)

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT, then drain."""
        stop = asyncio.Event()
        with stop_on_signals(stop):
            await self._serve(stop)
        logger.info("stopped")

    async def _serve(self, stop: asyncio.Event) -> None:
        self._pages.start()
        logger.info(
            "agx-sidecar %s: http://%s:%d/metrics, Redis at %s, prefix %s, sinks %s",
            __version__,
            self._settings.http_host,
            self._pages.port,
            self._settings.redis.place,
            self._settings.prefix,
            "+".join(sorted(self._settings.sinks)) or "none",
        )
        if self._console is not None:
            self._console.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                helpers = [tasks.create_task(self._health.tick()), tasks.create_task(self._watch_redis())]
                if self._push is not None:
                    helpers.append(tasks.create_task(self._push.run()))
                await self._work_until(stop)
                for helper in helpers:
                    helper.cancel()
        finally:
            await asyncio.to_thread(self._close)
            await self._link.client.aclose()

    async def _work_until(self, stop: asyncio.Event) -> None:
        work = asyncio.create_task(self._work(stop))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            logger.info("stopping: draining for at most %.0f s", self._settings.drain)
            await asyncio.wait({work}, timeout=self._settings.drain)
        stopping.cancel()
        if not work.done():
            logger.warning("not everything was exported in time: it stays pending for another replica")
            work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            if not work.cancelled():
                raise

    async def _work(self, stop: asyncio.Event) -> None:
        """Run the sinks, again from the start whenever the number of partitions changes."""
        while not stop.is_set():
            waiting = asyncio.create_task(wait_for_meta(self._link, self._settings.prefix))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if stop.is_set():
                waiting.cancel()
                return
            partitions = waiting.result().partitions
            start_over = False
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(watch_meta(self._link, self._settings.prefix, partitions))
                    if self._metrics is not None:
                        tasks.create_task(self._metrics.run(partitions, stop))
                    if self._traces is not None:
                        tasks.create_task(self._traces.run(partitions, stop))
                    if self._settings.sinks:  # without, it is a console's: that writes nothing by itself
                        tasks.create_task(self._reaper.run(partitions, stop))
                    await stop.wait()
                    watch.cancel()
            except* PartitionsChangedError as changed:
                logger.warning("starting over: %s", leaf_of(changed))
                start_over = True
            if self._traces is not None and not start_over:
                await self._traces.leave(partitions)

    async def _watch_redis(self) -> None:
        """Send a command when no other part does, to keep the link's state current; read the server's settings once."""
        await self._link.persist("look at the server's settings", self._check_eviction)
        while True:
            if time.monotonic() - self._link.last_reply >= _QUIET:
                await self._link.persist("ask for the time", lambda: self._link.call("TIME"))
            await asyncio.sleep(_QUIET)

    async def _check_eviction(self) -> None:
        try:
            memory = await self._link.call("INFO", "memory")
        except ResponseError:  # not allowed to look
            return
        policy = memory.get("maxmemory_policy") if isinstance(memory, dict) else None
        if policy not in {None, "noeviction"}:
            logger.error(
                "Redis may evict keys (maxmemory-policy %s): leases and queues would be lost; set it to noeviction",
                policy,
            )

    def _close(self) -> None:
        self._pages.close()
        if self._console is not None:
            self._console.close()
        if self._export is not None:
            self._export.close()
        if self._push is not None:
            self._push.close()


def run(settings: Settings) -> None:
    """Run one sidecar to its end; raises SettingsError if it can't start."""

    async def serve() -> None:
        sidecar = Sidecar(settings)
        # Facts and spans are short-lived and have no cycles: by default a seventh of the CPU would go into collections.
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        await sidecar.run()

    asyncio.run(serve())
