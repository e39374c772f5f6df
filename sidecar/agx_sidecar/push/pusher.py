"""Pushes the series to a collector at an interval, beside `/metrics` (AGX_METRICS_EXPORT=otlp)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from agx import __version__
from agx.telemetry.conventions import Semconv

from ..link import Link
from ..log import RepeatedWarnings
from ..metrics.series import Series
from ..metrics.sink import MetricsSink
from ..replica_metrics import show_replica
from ..semconv import named
from ..settings import PushSettings
from ..traces.otlp import MetricTransport
from .encoding import describe, fleet_resource, join

_GRACE = 1.0  # seconds beyond the exporter's own deadline


class MetricsPush:
    """Sends this replica's series, and the fleet's while it leads. A failed push is not repeated: the next has all."""

    def __init__(
        self,
        settings: PushSettings,
        prefix: str,
        *,
        link: Link,
        own: Series,
        metrics: MetricsSink | None,
        semconv: Semconv = "current",
    ) -> None:
        self._settings = settings
        self._link = link
        self._own = own
        self._metrics = metrics
        self._semconv = semconv
        self._transport = MetricTransport(settings)
        self._start_ns = time.time_ns()
        self._resource = _own_resource(prefix)
        self._fleet_resource = fleet_resource(self._resource)
        self._warnings = RepeatedWarnings(logging.getLogger(__name__))

    async def run(self) -> None:
        """Push until the task is cancelled."""
        while True:
            await asyncio.sleep(self._settings.interval)
            await self._push()

    def close(self) -> None:
        """Release the connections and end the push that is under way."""
        self._transport.close()

    async def _push(self) -> None:
        now_ns = self._link.now_ms() * 1_000_000
        fleet = {} if self._metrics is None else self._metrics.sample()
        own = show_replica(self._own, self._link, self._metrics)
        parts = [describe(self._resource, own, start_ns=self._start_ns, now_ns=now_ns)]
        if fleet and self._metrics is not None:
            series = named(fleet, self._semconv)
            parts.append(describe(self._fleet_resource, series, start_ns=self._metrics.begun_ns, now_ns=now_ns))
        sending = asyncio.create_task(asyncio.to_thread(self._transport.send, join(parts)))
        done, _ = await asyncio.wait({sending}, timeout=self._settings.timeout + _GRACE)
        if not done:
            self._transport.cut()
        if problem := await sending:
            self._warnings.warn(f"the metrics could not be pushed: {problem}")


def _own_resource(prefix: str) -> Resource:
    """Return this replica's resource; `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` come first."""
    defaults = Resource(
        {
            "service.name": "agx-sidecar",
            "service.namespace": prefix,
            "service.version": __version__,
            "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        }
    )
    return defaults.merge(OTELResourceDetector().detect())
