"""Who may use the console: the token, the cookie that stands for it, and where a request comes from."""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlsplit

from ..http import Request

COOKIE = "agx_console"
_LIFE = 12 * 3_600  # seconds that a login lasts
_HOSTS_HERE = ("localhost", "127.0.0.1", "::1")


class Gate:
    """Checks requests. Its cookie is derived from the token, so every replica with the same token takes it."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def admits(self, request: Request) -> bool:
        """Return whether a request may see pages.

        Without a token whoever reaches the port may; then it has to be asked for as this machine, since a web page
        could have its own name lead here.
        """
        if self._token is None:
            return _host(f"//{request.headers.get('host', '')}") in _HOSTS_HERE
        expiry, _, signature = _cookie(request).partition(".")
        if not _same(signature, self._sign(expiry)):
            return False
        return int(expiry) > time.time()  # signed, so it is a number

    def is_from_here(self, request: Request) -> bool:
        """Return whether a POST was sent by one of our own pages: browsers say so, and no page can make them lie."""
        scheme, _, place = request.headers.get("origin", "").partition("://")
        return scheme in ("http", "https") and place == request.headers.get("host")

    def log_in(self, request: Request, token: str) -> str | None:
        """Return the Set-Cookie header for who knows the token, or None."""
        if self._token is None or not _same(token, self._token):
            return None
        expiry = str(int(time.time()) + _LIFE)
        # Behind a proxy that ends TLS the cookie must never travel without it.
        secure = "; Secure" if request.headers.get("x-forwarded-proto") == "https" else ""
        return f"{COOKIE}={expiry}.{self._sign(expiry)}; Path=/; HttpOnly; SameSite=Strict{secure}"

    def _sign(self, expiry: str) -> str:
        key = (self._token or "").encode()
        return hmac.new(key, f"agx-console:{expiry}".encode(), hashlib.sha256).hexdigest()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _cookie(request: Request) -> str:
    for pair in request.headers.get("cookie", "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return value
    return ""
