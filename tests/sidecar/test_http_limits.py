"""The limits of the sidecar's HTTP server: size, time and number of what clients may send; smuggled lengths."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from support.made_facts import ended, started
from support.replica import Queue, Replica, StartReplica
from support.visitor import TOKEN, console_port
from support.waiting import wait_until_sync

from agx_sidecar import http
from agx_sidecar.http import MAX_CONNECTIONS, MAX_HEAD, HttpServer, make_app

Serve = Callable[[], HttpServer]
BIG = 32 * 1024 * 1024  # more than any buffer between a server and a client that does not read


async def echo(request: Request) -> Response:
    return PlainTextResponse(await request.body())


async def send_much(request: Request) -> Response:
    return PlainTextResponse("x" * BIG)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves two pages in this process."""
    with ExitStack() as stack:

        def start() -> HttpServer:
            routes = [Route("/", echo, methods=["GET", "POST"]), Route("/much", send_much)]
            server = HttpServer("127.0.0.1", 0, make_app(routes, exception_handlers={}), port_variable="PORT")
            server.start()
            stack.callback(server.close)
            return server

        yield start


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def exchange(port: int, request: bytes) -> bytes:
    """Send a request and return all that comes back until the server closes the connection."""
    with connect(port) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while chunk := connection.recv(65_536):
                answer += chunk
        except ConnectionResetError:  # it closed before it had read all of the request
            pass
        return answer


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection on which it has sent nothing."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def resident(replica: Replica) -> int:
    """Resident memory, in pages."""
    return int(Path(f"/proc/{replica.child.pid}/statm").read_text().split()[1])


@pytest.fixture
def replica(queue: Queue, start_replica: StartReplica) -> Replica:
    """A sidecar with a console that asks for a token, and a run that it has counted."""
    queue.add(started(), ended())
    replica = start_replica(AGX_CONSOLE="read", AGX_CONSOLE_PORT="0", AGX_CONSOLE_TOKEN=TOKEN)
    wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == 1)
    return replica


@pytest.mark.parametrize("line", [b"X: " + b"x" * 60_000 + b"\r\n", b"X-Many: x\r\n" * 2_000])
def test_large_headers_before_login_take_no_memory(replica: Replica, line: bytes) -> None:
    before = resident(replica)
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(console_port(replica))) for _ in range(15)]
        for connection in connections:
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
                for _ in range(6_000_000 // len(line)):
                    connection.sendall(line)
            except ConnectionError:  # refused before all of it was sent
                continue
            pytest.fail("six megabytes of headers were read")
        assert resident(replica) < 1.3 * before
    assert replica.get("/healthz")[0] == 200


@pytest.mark.parametrize("size", [MAX_HEAD + 1_000, 8 * MAX_HEAD])
def test_headers_above_the_cap_are_refused_though_they_come_at_once(serve: Serve, size: int) -> None:
    answer = exchange(serve().port, b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * size + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")) or (not answer and size > 65_536)


def test_headers_below_the_cap_are_read(serve: Serve) -> None:
    head = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX: " + b"x" * (MAX_HEAD - 1_000) + b"\r\n\r\n"
    assert exchange(serve().port, head).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "lengths",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 60\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 60\r\n",
        b"Content-Length: 5, 60\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 5000\r\n",
        b"Content-Length: " + b"9" * 5_000 + b"\r\n",
    ],
)
def test_what_follows_an_ambiguous_length_is_never_read_as_a_request(serve: Serve, lengths: bytes) -> None:
    smuggled = b"0\r\n\r\nGET /much HTTP/1.1\r\nHost: h\r\n\r\n"
    answer = exchange(serve().port, b"POST / HTTP/1.1\r\nHost: h\r\n" + lengths + b"\r\n" + smuggled)
    assert answer.startswith(b"HTTP/1.1 4")
    assert answer.count(b"HTTP/1.1 ") == 1


def send_part(connection: socket.socket) -> None:
    """Begin a request; the server may have closed the connection by now."""
    with suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost:")


def test_slow_clients_do_not_keep_a_scraper_out(replica: Replica) -> None:
    with ExitStack() as stack:
        for _ in range(2 * MAX_CONNECTIONS):
            send_part(stack.enter_context(connect(replica.port)))
        assert replica.scrape().total("agx_runs_total") == 1


def test_above_the_cap_the_connection_that_waits_longest_is_closed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_DEADLINE", 600.0)
    server = serve()
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(server.port)) for _ in range(MAX_CONNECTIONS + 20)]
        for connection in slow:
            send_part(connection)
        wait_until_sync(lambda: all(is_closed(connection) for connection in slow[:20]))
        assert not any(is_closed(connection) for connection in slow[20:])


@pytest.mark.parametrize(
    "start", [b"", b"GET / HTTP/1.1\r\nHost:", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf"]
)
def test_a_request_that_does_not_end_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(http, "REQUEST_DEADLINE", 0.2)
    with connect(serve().port) as connection:
        connection.sendall(start)
        wait_until_sync(lambda: is_closed(connection))


def test_a_drip_of_bytes_does_not_extend_the_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_DEADLINE", 0.3)
    with connect(serve().port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")

        def is_cut_off() -> bool:
            try:
                connection.send(b"x")
            except ConnectionError:
                return True
            return False

        wait_until_sync(is_cut_off)


def test_an_idle_connection_answers_again_until_its_time_is_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_DEADLINE", 30.0)
    monkeypatch.setattr(http, "IDLE_TIMEOUT", 0.5)
    connection = HTTPConnection("127.0.0.1", serve().port, timeout=30)
    for _ in range(3):
        connection.request("POST", "/", body=b"again")
        assert connection.getresponse().read() == b"again"
    wait_until_sync(lambda: is_closed(connection.sock))
    connection.close()


def test_a_client_that_closes_its_sending_side_is_answered(serve: Serve) -> None:
    with connect(serve().port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_the_server_closes_though_clients_stall(serve: Serve) -> None:
    server = serve()
    with ExitStack() as stack:
        for request in (b"", b"GET / HTTP/1.1\r\nHost:", b"GET /much HTTP/1.1\r\nHost: h\r\n\r\n") * 5:
            connection = stack.enter_context(connect(server.port))
            connection.sendall(request)
        connection.recv(1)  # the last one's response is under way, and is not read
        server.close()
        assert not any(thread.name == f"http-{server.port}" for thread in threading.enumerate())


def test_sigterm_is_not_held_up_by_clients_that_stall(replica: Replica) -> None:
    with ExitStack() as stack:
        for port in (replica.port, console_port(replica)):
            for request in (b"", b"GET /metrics HTTP/1.1\r\nHost:", b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n"):
                stack.enter_context(connect(port)).sendall(request)
        assert replica.end() == 0
        assert "Traceback" not in replica.log
