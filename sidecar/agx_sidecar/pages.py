"""Serves /metrics, /healthz and /readyz."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agx.telemetry.conventions import Semconv

from .health import ALIVE_WITHIN, Health
from .http import make_app
from .link import Link
from .metrics import instruments as i
from .metrics.exposition import Snapshot, render
from .metrics.series import Sample, Series
from .metrics.sink import MetricsSink
from .replica_metrics import show_replica
from .semconv import named


class Pages:
    """The pages of one replica. The main loop is asked for a copy of its series; all else is done in other threads."""

    def __init__(
        self, health: Health, link: Link, own: Series, metrics: MetricsSink | None, *, semconv: Semconv = "current"
    ) -> None:
        self._health = health
        self._link = link
        self._own = own
        self._metrics = metrics
        self._semconv = semconv
        self._main_loop = asyncio.get_running_loop()
        self._rendering = asyncio.Lock()  # one at a time: each holds the interpreter for a while

    def make_app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/metrics", self._show_metrics),
            Route("/healthz", self._show_health),
            Route("/readyz", self._show_readiness),
        ]
        return make_app(routes, exception_handlers={404: _not_found})

    async def _show_metrics(self, request: Request) -> Response:
        async with self._rendering:
            copying = asyncio.run_coroutine_threadsafe(self._copy(), self._main_loop)
            async with asyncio.timeout(ALIVE_WITHIN):
                own, fleet = await asyncio.wrap_future(copying)
            try:
                accept = request.headers.get("accept", "")
                body, content_type = await asyncio.to_thread(self._render, own, fleet, accept)
            except Exception as error:
                self._health.render_error = f"{type(error).__name__}: {error}"
                raise
            self._health.render_error = None
        return Response(body, headers={"Content-Type": content_type})

    async def _copy(self) -> tuple[Snapshot, Snapshot]:
        """Copy this replica's series and the fleet's, between two facts."""
        fleet = self._metrics.sample() if self._metrics is not None else {}
        return show_replica(self._own, self._link, self._metrics), fleet

    def _render(self, own: Snapshot, fleet: Snapshot, accept: str) -> tuple[bytes, str]:
        rendered = render({**own, **named(fleet, self._semconv)}, accept)
        if fleet and self._metrics is not None and not self._metrics.exporting:
            # The lease ran out while we rendered: another may lead by now.
            rendered = render({**own, i.IS_LEADER: [Sample((), 0)]}, accept)
        return rendered

    async def _show_health(self, request: Request) -> Response:
        return _probe(self._health.why_not_alive())

    async def _show_readiness(self, request: Request) -> Response:
        return _probe(self._health.why_not_ready())


def _probe(problem: str | None) -> Response:
    return PlainTextResponse("ok\n") if problem is None else PlainTextResponse(f"{problem}\n", 503)


def _not_found(request: Request, error: Exception) -> Response:
    return PlainTextResponse("not found; there are /healthz, /metrics, /readyz\n", 404)
