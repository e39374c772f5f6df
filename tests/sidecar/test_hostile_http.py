"""Requests that no browser makes: the sidecar's pages and its console answer or close, and go on; nothing is a 500."""

from __future__ import annotations

import socket
from urllib.parse import quote, urlencode

from hypothesis import example, given
from hypothesis import strategies as st
from support.made_facts import ended, node, started, tool
from support.replica import Queue, StartReplica
from support.visitor import console_port
from support.waiting import wait_until_sync

PATHS = ("/metrics", "/healthz", "/readyz", "/", "/run", "/login", "/logout", "/cancel", "/console.css", "/nowhere")
WORDS = ("scope", "user", "session", "run", "token", "before", "text", "outcome", "agent")
HEADERS = ("Host", "Origin", "Referer", "Cookie", "Accept", "Accept-Encoding", "Content-Type", "Content-Length",
           "Transfer-Encoding", "Connection", "Expect", "X-Forwarded-Host")  # fmt: skip

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "0", "-1", "9" * 5_000, "acme", "run-1", "*", "a:b", "../..", "\x00", "\r\nX: y", "<b>", "a" * 9_000]
    ),
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request that is almost one, or bytes that are none."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    method = draw(st.sampled_from(["GET", "POST", "HEAD", "PUT", "get", "G T", ""]))
    path = draw(st.sampled_from(PATHS) | texts.map(lambda text: "/" + quote(text)) | texts)
    fields = draw(st.lists(st.tuples(st.sampled_from(WORDS) | texts, texts), max_size=4))
    form = urlencode(fields, errors="replace").encode()
    query = draw(st.sampled_from([b"", b"?" + form, b"?" + draw(st.binary(max_size=30))]))
    body = draw(st.sampled_from([b"", form]) | st.binary(max_size=100))
    headers = draw(st.lists(st.tuples(st.sampled_from(HEADERS), texts), max_size=4))
    if draw(st.booleans()):
        headers.append(("Content-Length", str(len(body))))
    lines = [f"{method} {path}".encode("utf-8", "replace") + query + b" HTTP/1.1"]
    lines += [f"{name}: {value}".encode("utf-8", "replace") for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


def ask(port: int, request: bytes) -> bytes:
    """Return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65_536):
                answer += chunk
        except TimeoutError:
            raise
        except OSError:  # it may close before it has read all of it
            pass
        return answer


def test_whatever_is_asked_nothing_breaks(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(started(), node(), tool(), ended())
    replica = start_replica(AGX_CONSOLE="full", AGX_CONSOLE_PORT="0")
    wait_until_sync(lambda: replica.scrape().total("agx_runs_total") == 1)
    ports = (replica.port, console_port(replica))

    @example(b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5_000 + b"\r\n\r\n")
    @given(requests())
    def check(request: bytes) -> None:
        for port in ports:
            answer = ask(port, request)
            for line in answer.split(b"\r\n"):
                assert not line.startswith((b"HTTP/1.1 500", b"HTTP/1.0 500")), answer

    check()
    assert replica.get("/healthz")[0] == 200
    assert replica.scrape().total("agx_runs_total") == 1
    assert "Traceback" not in replica.log
    assert "failed" not in replica.log
