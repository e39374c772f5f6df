"""Serves /metrics, /healthz and /readyz, each request in a thread, so that a scrape never stalls consumption."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .settings import SettingsError

logger = logging.getLogger(__name__)

_SOCKET_TIMEOUT = 10.0  # seconds a client may be silent


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page says."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Page = Callable[[Mapping[str, str]], Answer]  # from the request's headers, names in lower case


class PageServer:
    """A small HTTP server for GET and HEAD of a few pages."""

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        """Bind, so that a taken port is known before anything else is started.

        Raises:
            SettingsError: the address can't be had.
        """

        class Handler(_Handler):
            routes = pages

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise SettingsError(
                f"can't listen on {host}:{port} ({error.strerror or error}): set AGX_HTTP_HOST and AGX_HTTP_PORT "
                "to an address that is free"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="http")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop answering; requests under way end by themselves."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    routes: Mapping[str, Page]
    timeout = _SOCKET_TIMEOUT
    protocol_version = "HTTP/1.1"
    server_version = "agx-sidecar"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.routes.get(self.path.partition("?")[0])
        headers = {name.lower(): value for name, value in self.headers.items()}
        if page is None:
            known = ", ".join(sorted(self.routes))
            self._answer(Answer(404, f"not found; there are {known}\n".encode()), headers)
            return
        try:
            answer = page(headers)
        except Exception:  # one broken page must not look like a dead sidecar
            logger.exception("%s failed", self.path.partition("?")[0])
            answer = Answer(500, b"failed; the sidecar's log says why\n")
        self._answer(answer, headers)

    do_HEAD = do_GET

    def _answer(self, answer: Answer, headers: Mapping[str, str]) -> None:
        body = answer.body
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        if "gzip" in headers.get("accept-encoding", "") and len(body) > 1_000:
            body = gzip.compress(body, 5)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
