"""Access to the console: the token, the cookie of a login, the origin of a form, and the security headers of pages."""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "agx_console"
_LOGIN_SECONDS = 12 * 3_600
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
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


class Gate:
    """Checks requests. Its cookie is derived from the token, so every replica with the same token takes it."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def admits(self, request: Request) -> bool:
        """Return whether a request may see pages.

        Without a token anyone who reaches the port may. Then the Host header has to name this machine: a hostile web
        page could otherwise let its own name resolve to 127.0.0.1 and read the console (DNS rebinding).
        """
        if self._token is None:
            return _host(f"//{request.headers.get('host', '')}") in _LOOPBACK_HOSTS
        expiry, _, signature = request.cookies.get(COOKIE, "").partition(".")
        if not _same(signature, self._sign(expiry)):
            return False
        return int(expiry) > time.time()  # signed, so it is a number

    def is_from_own_page(self, request: Request) -> bool:
        """Return whether a POST was sent by one of our own pages: browsers set Origin, and no script can change it."""
        scheme, _, place = request.headers.get("origin", "").partition("://")
        return scheme in ("http", "https") and place == request.headers.get("host")

    def log_in(self, request: Request, token: str) -> str | None:
        """Return the Set-Cookie header of a login, or None if the token is wrong."""
        if self._token is None or not _same(token, self._token):
            return None
        expiry = str(int(time.time()) + _LOGIN_SECONDS)
        return _cookie(request, f"{expiry}.{self._sign(expiry)}")

    @staticmethod
    def log_out(request: Request) -> str:
        """Return the Set-Cookie header that ends the login of this browser."""
        return f"{_cookie(request, '')}; Max-Age=0"

    def _sign(self, expiry: str) -> str:
        key = (self._token or "").encode()
        return hmac.new(key, f"agx-console:{expiry}".encode(), hashlib.sha256).hexdigest()


def _cookie(request: Request, value: str) -> str:
    # Behind a proxy that ends TLS the cookie must never travel without it.
    secure = "; Secure" if request.headers.get("x-forwarded-proto") == "https" else ""
    return f"{COOKIE}={value}; Path=/; HttpOnly; SameSite=Strict{secure}"


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def client_of(request: Request) -> str:
    """Return the address of a client, for the log: behind a trusted proxy the one that the proxy names."""
    return request.client.host if request.client is not None else "unknown"


class SecurityHeaders:
    """Adds the headers that keep other sites and foreign scripts away from the pages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)
