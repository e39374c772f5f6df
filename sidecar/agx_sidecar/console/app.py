"""The console as an application: which request gets which page, and who may send it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agx.control.cancellation import keep_mark, mark_cancelled
from agx.fleet.fleet import read_clock, read_lease_ttl
from agx.redis.bus import Bus
from agx.redis.cluster_bus import open_bus_at
from agx.redis.keys import SessionKeys

from ..http import HttpServer, make_app
from ..settings import ConsoleSettings, Settings
from .auth import Gate, SecurityHeaders, client_of
from .conversation import read_conversation
from .formatting import run_url
from .html import Child, Html, h, page
from .index_page import index_view
from .overview import Query, read_overview
from .run_history import RunPlace, read_history
from .run_page import run_view, unknown_view
from .waiting_calls import NoLongerWaitsError, decide

logger = logging.getLogger(__name__)

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

_REDIS_TIMEOUT = 8.0  # seconds for all that a page reads; below the deadline of a request
_FILES = {
    "/console.css": "text/css; charset=utf-8",
    "/console.js": "text/javascript; charset=utf-8",
    "/icon.svg": "image/svg+xml",
}
# No other site, and no second header.
_OWN_PAGE = re.compile(r"/(run)?(\?[!-~]*)?")


class ConsoleServer(HttpServer):
    """The console on a port of its own."""

    def __init__(self, settings: Settings, console: ConsoleSettings) -> None:
        """Bind the port; raises SettingsError where it can't be bound."""
        app = Console(settings, console).make_app()
        super().__init__(
            console.host, console.port, app, port_variable="AGX_CONSOLE_PORT", trusted_proxies=console.trusted_proxies
        )
        self._console = console

    def start(self) -> None:
        super().start()
        host = f"[{self._console.host}]" if ":" in self._console.host else self._console.host
        mode = "full: it can cancel runs and decide on tool calls" if self._console.can_write else "read"
        texts = "shown" if self._console.shows_content else "hidden"
        logger.info("console at http://%s:%d/, %s, texts %s", host, self.port, mode, texts)


class Console:
    """The pages; they read Redis on connections of their own, beside the sidecar's."""

    _bus: Bus  # while the application is served

    def __init__(self, settings: Settings, console: ConsoleSettings) -> None:
        self._settings = settings
        self._console = console
        self._gate = Gate(console.token)
        self._keeping: set[asyncio.Task[None]] = set()  # cancels whose run has not ended yet

    def make_app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/", self._for_visitors(self._show_index)),
            Route("/run", self._for_visitors(self._show_run)),
            Route("/cancel", self._from_own_page(self._for_visitors(self._cancel)), methods=["POST"]),
            Route("/decide", self._from_own_page(self._for_visitors(self._decide)), methods=["POST"]),
            Route("/login", self._from_own_page(self._log_in), methods=["POST"]),
            Route("/login", self._leave_login),
            Route("/logout", self._from_own_page(self._log_out), methods=["POST"]),
            *(Route(path, _serve_file(path)) for path in _FILES),
        ]
        return make_app(
            routes,
            middleware=[Middleware(SecurityHeaders)],
            exception_handlers={
                404: self._refuse_path,
                405: self._refuse_path,
                RedisError: self._report_outage,
                OSError: self._report_outage,  # a TimeoutError is one
            },
            lifespan=self._connect,
        )

    @asynccontextmanager
    async def _connect(self, app: Starlette) -> AsyncIterator[None]:
        self._bus = open_bus_at(self._settings.redis, client_name="agx-sidecar")
        try:
            yield
        finally:
            for task in self._keeping:
                task.cancel()
            await asyncio.gather(*self._keeping, return_exceptions=True)
            await self._bus.aclose()

    # --- access ---

    def _for_visitors(self, respond: Endpoint) -> Endpoint:
        """Return the endpoint for those who are logged in; others get the page that asks for the token."""

        async def check(request: Request) -> Response:
            if self._gate.admits(request):
                return await respond(request)
            return self._ask_for_token(401 if self._console.token else 403, _target(request))

        return check

    def _from_own_page(self, respond: Endpoint) -> Endpoint:
        """Return the endpoint for forms of the console's own pages."""

        async def check(request: Request) -> Response:
            if self._gate.is_from_own_page(request):
                return await respond(request)
            logger.warning(
                "console: a POST to %s from %s was not sent by its own page", request.url.path, client_of(request)
            )
            return self._message(403, "This was not sent by the console's own page", "Open it and try again there.")

        return check

    # --- pages ---

    async def _show_index(self, request: Request) -> Response:
        query = Query.of(request.query_params)
        overview = await _in_time(read_overview(self._bus, self._settings.prefix, query))
        view = index_view(overview, can_write=self._console.can_write, content=self._console.shows_content)
        return self._page("Runs", view)

    async def _show_run(self, request: Request) -> Response:
        try:
            place = _place_of(request.query_params)
            history = await _in_time(read_history(self._bus, self._settings.prefix, place))
        except ValueError:
            return self._message(400, "This is no run", "Its ids are not valid.")
        if not history.is_known:
            return self._page("Unknown run", unknown_view(), status=404)
        session, content = place.keys(self._settings.prefix), self._console.shows_content
        talk = await _in_time(read_conversation(self._bus, session)) if content and session is not None else []
        view = run_view(history, can_cancel=self._console.can_write, content=content, conversation=talk)
        return self._page("Run", view)

    async def _leave_login(self, request: Request) -> Response:
        """Lead away from the address that a form with a wrong token leaves behind."""
        return _redirect("/")

    # --- forms ---

    async def _mark_cancelled(self, session: SessionKeys, run_id: str) -> bool:
        now_ms, lease_ttl = await asyncio.gather(
            read_clock(self._bus), read_lease_ttl(self._bus, self._settings.prefix)
        )
        found = await mark_cancelled(self._bus, session, run_id, now_ms=now_ms, lease_ttl=lease_ttl)
        if found:
            # It may take longer than a visitor waits.
            task = asyncio.create_task(self._keep_mark(session, run_id, now_ms=now_ms, lease_ttl=lease_ttl))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)
        return found

    async def _keep_mark(self, session: SessionKeys, run_id: str, *, now_ms: int, lease_ttl: float) -> None:
        try:
            await keep_mark(self._bus, session, run_id, now_ms=now_ms, lease_ttl=lease_ttl)
        except (RedisError, OSError) as error:
            logger.warning("console: run %s may go on although it was cancelled (%s)", run_id, type(error).__name__)

    async def _cancel(self, request: Request) -> Response:
        if not self._console.can_write:
            return self._message(403, "This console may only read", "Set AGX_CONSOLE=full to let it cancel runs.")
        try:
            place = _place_of(await _read_form(request))
            session = place.keys(self._settings.prefix)
        except ValueError:
            session = None
        if session is None:
            return self._message(400, "This is no run", "Its ids are not valid.")
        found = await _in_time(self._mark_cancelled(session, place.run_id))
        logger.warning(
            "console: %s cancelled run %s of %s/%s/%s: %s",
            client_of(request),
            place.run_id,
            session.scope,
            session.user,
            session.session,
            "marked" if found else "it was over",
            extra={"run_id": place.run_id},
        )
        if not found:
            return self._message(409, "Too late to cancel", "The run had already ended.")
        return _redirect(run_url(place.scope, place.run_id, place.user, place.session, 0))

    async def _decide(self, request: Request) -> Response:
        if not (self._console.can_write and self._console.shows_content):
            needs = "Set AGX_CONSOLE=full and AGX_CONSOLE_CONTENT=1 to let it decide on tool calls."
            return self._message(403, "This console may only read", needs)
        form, who = await _read_form(request), client_of(request)
        try:
            call, decision = await _in_time(decide(self._bus, self._settings.prefix, form, f"console/{who}"))
        except ValueError:
            return self._message(400, "This is no tool call", "Its ids or the decision are not valid.")
        except NoLongerWaitsError:
            return self._message(409, "This call does not wait", "Somebody else has decided, or its run has gone on.")
        place = "/".join(call.session)
        text = "console: %s %s call %s of tool %s in %s"
        fields = {"run_id": call.run_id, "session": place, "tool": call.tool, "by": decision.by}
        logger.warning(text, who, decision.kind, call.call_id, call.tool, place, extra=fields)
        return _redirect("/")

    async def _log_in(self, request: Request) -> Response:
        form = await _read_form(request)
        cookie, to = self._gate.log_in(request, form.get("token", "")), form.get("to", "/")
        if not _OWN_PAGE.fullmatch(to):
            to = "/"
        if cookie is None:
            logger.warning("console: %s gave a wrong token", client_of(request))
            return self._ask_for_token(403, to, wrong=True)
        logger.info("console: %s logged in", client_of(request))
        return _redirect(to, {"Set-Cookie": cookie})

    async def _log_out(self, request: Request) -> Response:
        logger.info("console: %s logged out", client_of(request))
        return _redirect("/", {"Set-Cookie": self._gate.log_out(request)})

    # --- answers in place of a page ---

    def _ask_for_token(self, status: int, to: str, *, wrong: bool = False) -> Response:
        if self._console.token is None:
            return self._message(403, "Not from here", "Without a token the console answers to localhost only.")
        given = h("input", id="token", name="token", type="password", required=True, autofocus=True,
                  autocomplete="current-password", aria_describedby="wrong" if wrong else None)  # fmt: skip
        back = h("input", type="hidden", name="to", value=to)  # a link leads to its page after the login
        form = h("form", h("label", "Token", for_="token"), given, back, h("button", "Open"),
                 method="post", action="/login", id="login", class_="find")  # fmt: skip
        error = h("p", "That is not the token.", id="wrong", role="alert", class_="alert") if wrong else None
        hint = h("p", "It is the value of AGX_CONSOLE_TOKEN.", class_="quiet")
        return self._page("Log in", h("main", h("h1", "agx console"), error, form, hint, id="view"), status=status)

    async def _refuse_path(self, request: Request, error: Exception) -> Response:
        status, headers = getattr(error, "status_code", 404), getattr(error, "headers", None)
        answer = self._message(status, "There is no such page", "")
        answer.headers.update(headers or {})
        return answer

    async def _report_outage(self, request: Request, error: Exception) -> Response:
        logger.warning("the console has no answer from Redis: %s", type(error).__name__)
        return self._message(503, "Redis does not answer", "The page tries again by itself.", retry=True)

    def _message(self, status: int, title: str, text: str, *, retry: bool = False) -> Response:
        back = h("p", h("a", "All runs", href="/"))
        view = h("main", h("h1", title), h("p", text), back, id="view", data_every=2000 if retry else 0)
        return self._page(title, view, status=status)

    def _page(self, title: str, view: Html, *, status: int = 200) -> Response:
        home = h("a", h("img", src="/icon.svg", alt=""), "agx console", href="/", class_="home")
        about: list[Child] = [home, h("code", self._settings.prefix)]
        about.append(h("span", "full" if self._console.can_write else "read only", class_="mode"))
        state = h("span", id="state", role="status", class_="mode")
        pause = h("button", "Pause updates", id="pause", type="button", aria_pressed="false", hidden=True)
        skip = h("a", "Skip to the content", href="#view", class_="skip")
        leave = None
        if self._console.token is not None and status not in (401, 403):
            leave = h("form", h("button", "Log out"), method="post", action="/logout", class_="leave")
        body = page(f"{title} · agx", skip, h("header", *about, state, pause, leave), view)
        return Response(body, status, media_type="text/html")


def _serve_file(path: str) -> Endpoint:
    content, media_type = files(__package__).joinpath(path[1:]).read_bytes(), _FILES[path]

    async def respond(request: Request) -> Response:
        return Response(content, headers={"Content-Type": media_type})

    return respond


def _redirect(to: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status_code=303, headers={"Location": to, **(headers or {})})


async def _in_time(work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(_REDIS_TIMEOUT):
        return await work


async def _read_form(request: Request) -> dict[str, str]:
    body = await request.body()
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        return {}


def _target(request: Request) -> str:
    """Return the path and query of a page as they were sent; after a form, the index page."""
    if request.method == "POST":
        return "/"
    raw_path, query = (
        request.scope["raw_path"].decode("ascii"),
        request.scope["query_string"].decode("ascii", "replace"),
    )
    return f"{raw_path}?{query}" if query else raw_path


def _place_of(given: Mapping[str, str]) -> RunPlace:
    at = given.get("at", "")
    at_ms = int(at) if at.isascii() and at.isdecimal() and len(at) < 15 else 0
    user, session = given.get("user") or None, given.get("session") or None
    return RunPlace(given.get("scope", ""), given.get("run", ""), user, session, at_ms)
