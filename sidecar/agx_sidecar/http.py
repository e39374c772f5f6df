"""Serves an ASGI application with uvicorn in a thread of its own, within limits that a hostile client can't exceed.

The thread has its own event loop, so pages are answered while the sidecar's main loop is busy, and the main loop never
waits for a client. What uvicorn does not limit is limited here: the size of a request, the time of each request, and
the number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, ExceptionHandler, Lifespan, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import SettingsError

logger = logging.getLogger(__name__)

MAX_HEAD = 16 * 1024  # bytes of the request line and all headers
MAX_BODY = 4 * 1024  # bytes
MAX_CONNECTIONS = 100  # of one port; the one that waits longest makes room for a new one
REQUEST_DEADLINE = 10.0  # seconds from a request's first byte to the end of its response
IDLE_TIMEOUT = 75  # seconds between two requests of a connection; above Prometheus's usual interval of 60 s
_TICK = 1.0  # seconds
_CLOSE_TIMEOUT = 1  # seconds that responses under way may take when the server closes


class _Connection(H11Protocol):
    """uvicorn's connection, with a deadline in every state, and a cap on the number of connections."""

    waits_since: float
    _timer: asyncio.TimerHandle | None = None
    _is_idle = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._start_timer(REQUEST_DEADLINE)
        if len(self.connections) > MAX_CONNECTIONS:
            # Clients that are slow on purpose would otherwise keep scrapers out.
            oldest = min((each for each in self.connections if isinstance(each, _Connection)), key=_waits_since)
            self.connections.discard(oldest)  # its end comes later, and others may be accepted before
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self._is_idle = False
            self._start_timer(REQUEST_DEADLINE)
        super().data_received(data)

    def eof_received(self) -> bool | None:  # type: ignore[override] # asyncio's own type
        """Answer a client that closes its sending side after a whole request; uvicorn would drop the response."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        return True

    def on_response_complete(self) -> None:
        self._is_idle = True
        self._start_timer(IDLE_TIMEOUT)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.waits_since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self.transport.abort)


def _waits_since(connection: _Connection) -> float:
    return connection.waits_since


class _SizeLimit:
    """Refuses a request whose head or body is too large, or whose body's length is ambiguous.

    The connection is closed after a refusal: what was not read could be taken for the next request. Two different
    values of Content-Length are refused by h11 before this.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refuse(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


def _refuse(scope: Scope) -> Response | None:
    closes = {"Connection": "close"}
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEAD:  # h11 looks at the size of incomplete heads only
        return PlainTextResponse(f"headers may have {MAX_HEAD} bytes together\n", 431, closes)
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return PlainTextResponse("a body needs Content-Length, and no Transfer-Encoding\n", 411, closes)
    if int(headers.get("content-length", "0")) > MAX_BODY:  # h11 lets only digits pass, at most 20
        return PlainTextResponse(f"a body may have {MAX_BODY} bytes\n", 413, closes)
    return None


def make_app(
    routes: Sequence[BaseRoute],
    *,
    exception_handlers: dict[type[Exception] | int, ExceptionHandler],
    middleware: Sequence[Middleware] = (),
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """Return an application whose responses are compressed for clients that accept it; an exception is logged."""
    app = Starlette(
        routes=routes,
        middleware=[*middleware, Middleware(GZipMiddleware, minimum_size=1_000, compresslevel=5)],
        exception_handlers={Exception: _fail, ClientDisconnect: _hang_up, **exception_handlers},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # the redirect would lead to whatever host the request names
    return app


def _fail(request: Request, error: Exception) -> Response:
    """Answer 500; one failing page must not look like a dead sidecar."""
    logger.error("%s failed", request.url.path, exc_info=error)
    return PlainTextResponse("failed; the sidecar's log has the error\n", 500)


def _hang_up(request: Request, error: Exception) -> Response:
    """Answer nothing that is read: the client went away while it sent its body."""
    return Response(status_code=400)


class _Server(uvicorn.Server):
    """Checks once a second, and on `stop()`, whether it has to stop; uvicorn's own server checks ten times a second."""

    _wake: Callable[[], object] = staticmethod(lambda: None)

    async def main_loop(self) -> None:
        woken = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, woken.set)
        while not await self.on_tick(0):  # also sets the `Date` of responses
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK):
                    await woken.wait()

    def stop(self) -> None:
        """End the loop from another thread."""
        self.should_exit = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._wake()


class HttpServer:
    """uvicorn in a thread of its own."""

    def __init__(
        self, host: str, port: int, app: ASGIApp, *, port_variable: str, trusted_proxies: tuple[str, ...] = ()
    ) -> None:
        """Bind, so that an occupied port is reported before anything else starts.

        `trusted_proxies` are the addresses and networks whose `X-Forwarded-For` names the client.

        Raises:
            SettingsError: the address can't be bound.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise SettingsError(
                f"can't listen on {host}:{port} ({error.strerror or error}): set AGX_HTTP_HOST and {port_variable} "
                "to an address that is free"
            ) from None
        self.port: int = self._socket.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                _SizeLimit(app),
                http=_Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                log_level="critical",  # else a warning for each malformed request; errors of pages are logged by _fail
                access_log=False,
                proxy_headers=bool(trusted_proxies),  # another client could name any address as its own
                forwarded_allow_ips=list(trusted_proxies),
                server_header=False,
                timeout_keep_alive=IDLE_TIMEOUT,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT,
                h11_max_incomplete_event_size=MAX_HEAD,
            )
        )
        self._thread = threading.Thread(target=self._serve, name=f"http-{self.port}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop, at most a second after the last responses; clients that read slowly are cut off."""
        self._server.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception:
            logger.exception("port %d is no longer served", self.port)

    async def _run(self) -> None:
        await self._server.serve(sockets=[self._socket])
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
