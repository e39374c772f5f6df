"""A small HTTP server for /metrics and its like: each request in a thread, so a scrape never stalls consumption."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from .settings import SettingsError

logger = logging.getLogger(__name__)

_SOCKET_TIMEOUT = 10.0  # seconds a client may be silent
_MAX_BODY = 4_096  # bytes


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks. Names of headers are in lower case; of a name given twice the last value counts."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    client: str
    target: str  # path and query, as they came


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page says."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[Request], Answer]


def route(pages: Mapping[str, Page]) -> Page:
    """Return one page that hands GET and HEAD to the pages by their paths."""

    def respond(request: Request) -> Answer:
        page = pages.get(request.path)
        if page is None:
            return Answer(404, f"not found; there are {', '.join(sorted(pages))}\n".encode())
        if request.method not in ("GET", "HEAD"):
            return Answer(405, b"only GET and HEAD\n", headers={"Allow": "GET, HEAD"})
        return page(request)

    return respond


class HttpServer:
    """A small HTTP server; each request in a thread."""

    def __init__(self, host: str, port: int, respond: Page, *, port_variable: str) -> None:
        """Bind, so that a taken port is known before anything else is started.

        Raises:
            SettingsError: the address can't be had.
        """

        class Handler(_Handler):
            page = staticmethod(respond)

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise SettingsError(
                f"can't listen on {host}:{port} ({error.strerror or error}): set AGX_HTTP_HOST and {port_variable} "
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
    page: Page
    timeout = _SOCKET_TIMEOUT
    protocol_version = "HTTP/1.1"
    server_version = "agx-sidecar"
    sys_version = ""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        # Its digits are counted first: Python refuses to read a number of thousands of them.
        is_short = length.isdecimal() and len(length) <= len(str(_MAX_BODY)) and int(length) <= _MAX_BODY
        if not is_short or "transfer-encoding" in headers:
            self.close_connection = True  # what was not read would be taken for the next request
            self._answer(Answer(413, f"a body has to say its length, at most {_MAX_BODY} bytes\n".encode()), headers)
            return
        try:
            request = Request(
                self.command,
                path,
                dict(parse_qsl(query, keep_blank_values=True, max_num_fields=20)),
                headers,
                self.rfile.read(int(length)),
                str(self.client_address[0]),
                self.path,
            )
        except ValueError:
            self._answer(Answer(400, b"too many parameters\n"), headers)
            return
        try:
            answer = self.page(request)
        except Exception:  # one broken page must not look like a dead sidecar
            logger.exception("%s failed", path)
            answer = Answer(500, b"failed; the sidecar's log says why\n")
        self._answer(answer, headers)

    do_HEAD = do_POST = do_GET

    def _answer(self, answer: Answer, headers: Mapping[str, str]) -> None:
        body = answer.body
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "gzip" in headers.get("accept-encoding", "") and len(body) > 1_000:
            body = gzip.compress(body, 5)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
