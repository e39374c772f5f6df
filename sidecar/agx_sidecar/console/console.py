"""The console's server: which request gets which page, and who may ask."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Coroutine, Mapping
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from redis.exceptions import RedisError

from agx.engine.cancellation import mark_cancelled
from agx.redis.bus import Bus
from agx.redis.cluster_bus import open_bus

from ..http import Answer, HttpServer, Request
from ..link import open_client
from ..settings import ConsoleSettings, Settings
from .auth import Gate
from .formatting import run_url
from .html import (
    Child,
    Html,
    h,
    page,
)
from .index_page import front_view
from .overview import Asked, read_overview
from .run_history import RunPlace, read_trail
from .run_page import run_view, unknown_view

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = 10.0  # seconds for Redis to answer a page
_HTML = "text/html; charset=utf-8"
_FILES = {
    "/console.css": "text/css; charset=utf-8",
    "/console.js": "text/javascript; charset=utf-8",
    "/icon.svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# No other site, and no second header.
_OWN_PAGE = re.compile(r"/(run)?(\?[!-~]*)?")
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would then hide a form's origin from us too.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Console:
    """Pages on a port of their own; they read Redis on a loop and connections of their own, beside the sidecar's."""

    def __init__(self, settings: Settings, console: ConsoleSettings) -> None:
        """Bind the port; raises SettingsError where it can't be had."""
        self._settings = settings
        self._console = console
        self._gate = Gate(console.token)
        self._files = {path: files(__package__).joinpath(path[1:]).read_bytes() for path in _FILES}
        self._server = HttpServer(console.host, console.port, self._respond, port_variable="AGX_CONSOLE_PORT")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="console", daemon=True)

    @property
    def url(self) -> str:
        host = f"[{self._console.host}]" if ":" in self._console.host else self._console.host
        return f"http://{host}:{self._server.port}/"

    def start(self) -> None:
        self._thread.start()
        self._bus = self._wait(self._open())
        self._server.start()
        mode = "full: it can cancel runs" if self._console.can_cancel else "read"
        logger.info("console at %s, %s, texts %s", self.url, mode, "shown" if self._console.shows_content else "hidden")

    async def _open(self) -> Bus:
        return open_bus(open_client(self._settings.redis), lambda: None)

    def close(self) -> None:
        """Stop answering and close the connections."""
        self._server.close()
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._bus.aclose(), self._loop).result(_PATIENCE)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def _respond(self, request: Request) -> Answer:
        try:
            answer = self._answer(request)
        except (RedisError, OSError) as error:  # a TimeoutError is one
            logger.warning("the console has no answer from Redis: %s", type(error).__name__)
            answer = self._message(503, "Redis does not answer", "The page tries again by itself.", retry=True)
        return Answer(answer.status, answer.body, answer.content_type, {**_HEADERS, **answer.headers})

    def _answer(self, request: Request) -> Answer:
        if request.path in _FILES:
            return Answer(200, self._files[request.path], _FILES[request.path])
        if request.path == "/login" and request.method != "POST":
            return Answer(303, b"", headers={"Location": "/"})  # who opens the page again that refused a token
        pages = {"/": self._front, "/run": self._run}
        forms = {"/login": self._log_in, "/cancel": self._cancel}
        is_post = request.method == "POST"
        respond = (forms if is_post else pages).get(request.path)
        if respond is None:
            return self._message(404, "There is no such page", "")
        if is_post and not self._gate.is_from_here(request):
            logger.warning("console: a POST to %s from %s was not sent by its own page", request.path, request.client)
            return self._message(403, "This was not sent by the console's own page", "Open it and try again there.")
        if request.path != "/login" and not self._gate.admits(request):
            return self._ask_for_token(401 if self._console.token else 403, "/" if is_post else request.target)
        return respond(request)

    def _front(self, request: Request) -> Answer:
        overview = self._wait(read_overview(self._bus, self._settings.prefix, Asked.of(request.query)))
        return self._page("Runs", front_view(overview))

    def _run(self, request: Request) -> Answer:
        try:
            place = _place_of(request.query)
            trail = self._wait(read_trail(self._bus, self._settings.prefix, place))
        except ValueError:
            return self._message(400, "This is no run", "Its ids are not valid.")
        if not trail.is_known:
            return self._page("Unknown run", unknown_view(), status=404)
        view = run_view(trail, can_cancel=self._console.can_cancel, content=self._console.shows_content)
        return self._page("Run", view)

    def _cancel(self, request: Request) -> Answer:
        if not self._console.can_cancel:
            return self._message(403, "This console may only read", "Set AGX_CONSOLE=full to let it cancel runs.")
        try:
            place = _place_of(_form(request))
            session = place.keys(self._settings.prefix)
        except ValueError:
            session = None
        if session is None:
            return self._message(400, "This is no run", "Its ids are not valid.")
        found = self._wait(mark_cancelled(self._bus, session, place.run_id))
        logger.warning(
            "console: %s told run %s of %s/%s/%s to stop: %s",
            request.client,
            place.run_id,
            session.scope,
            session.user,
            session.session,
            "marked" if found else "it was over",
            extra={"run_id": place.run_id},
        )
        return Answer(303, b"", headers={"Location": run_url(place.scope, place.run_id, place.user, place.session, 0)})

    def _log_in(self, request: Request) -> Answer:
        form = _form(request)
        cookie, to = self._gate.log_in(request, form.get("token", "")), form.get("to", "/")
        if not _OWN_PAGE.fullmatch(to):
            to = "/"
        if cookie is None:
            logger.warning("console: %s gave a wrong token", request.client)
            return self._ask_for_token(403, to, wrong=True)
        logger.info("console: %s logged in", request.client)
        return Answer(303, b"", headers={"Location": to, "Set-Cookie": cookie})

    def _ask_for_token(self, status: int, to: str, *, wrong: bool = False) -> Answer:
        if self._console.token is None:
            return self._message(403, "Not from here", "Without a token the console answers to localhost only.")
        given = h("input", id="token", name="token", type="password", required=True, autofocus=True,
                  autocomplete="current-password", aria_describedby="wrong" if wrong else None)  # fmt: skip
        back = h("input", type="hidden", name="to", value=to)  # who followed a link gets where it leads
        form = h("form", h("label", "Token", for_="token"), given, back, h("button", "Open"),
                 method="post", action="/login", id="login", class_="find")  # fmt: skip
        said = h("p", "That is not the token.", id="wrong", role="alert", class_="alert") if wrong else None
        hint = h("p", "It is what AGX_CONSOLE_TOKEN says.", class_="quiet")
        return self._page("Log in", h("main", h("h1", "agx console"), said, form, hint, id="view"), status=status)

    def _message(self, status: int, title: str, text: str, *, retry: bool = False) -> Answer:
        back = h("p", h("a", "All runs", href="/"))
        view = h("main", h("h1", title), h("p", text), back, id="view", data_every=2000 if retry else 0)
        return self._page(title, view, status=status)

    def _page(self, title: str, view: Html, *, status: int = 200) -> Answer:
        home = h("a", h("img", src="/icon.svg", alt=""), "agx console", href="/", class_="home")
        about: list[Child] = [home, h("code", self._settings.prefix)]
        about.append(h("span", "can cancel" if self._console.can_cancel else "read only", class_="mode"))
        state = h("span", id="state", role="status", class_="mode")
        pause = h("button", "Pause updates", id="pause", type="button", aria_pressed="false", hidden=True)
        skip = h("a", "Skip to the content", href="#view", class_="skip")
        return Answer(status, page(f"{title} · agx", skip, h("header", *about, state, pause), view), _HTML)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(_in_time(work), self._loop).result()


async def _in_time(work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wait_for(work, _PATIENCE)


def _form(request: Request) -> dict[str, str]:
    try:
        return dict(parse_qsl(request.body.decode(), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        return {}


def _place_of(given: Mapping[str, str]) -> RunPlace:
    at = given.get("at", "")
    at_ms = int(at) if at.isascii() and at.isdecimal() and len(at) < 15 else 0
    user, session = given.get("user") or None, given.get("session") or None
    return RunPlace(given.get("scope", ""), given.get("run", ""), user, session, at_ms)
