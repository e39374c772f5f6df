"""A model over real HTTP: an OpenAI-compatible chat server that answers, stalls and breaks as a test scripts it."""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from openai import AsyncOpenAI
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from .waiting import wait_until_sync

MODEL = "gpt-4o-mini"  # a name with a known price


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, one SSE chunk."""

    delta: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call whose JSON arguments come in as many chunks as there are fragments."""

    name: str
    fragments: tuple[str, ...]
    call_id: str = "call_1"


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing more until the test calls `release()`, or the client goes away."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The orderly end: a finish reason, then the usage (None sends none), then [DONE]."""

    reason: str = "stop"
    input_tokens: int | None = 10
    output_tokens: int = 5


@dataclass(frozen=True, slots=True)
class CleanCut:
    """The stream ends in good order for HTTP, but before the finish reason."""


@dataclass(frozen=True, slots=True)
class HardCut:
    """The connection is reset in the middle of the stream."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """No stream at all: an HTTP error, as a rate limit sends one."""

    status: int = 429
    message: str = "rate limited"
    headers: Mapping[str, str] = field(default_factory=dict)


Step = Text | ToolCall | Silence | Finish | CleanCut | HardCut | Refusal
Reply = tuple[Step, ...]


def say(text: str, *, finish: Finish | None = None) -> Reply:
    """Return a whole answer, one chunk per word, and its end."""
    words = text.split(" ")
    deltas = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
    return (*(Text(delta) for delta in deltas), finish or Finish(output_tokens=len(words)))


def call(name: str, *fragments: str, call_id: str = "call_1") -> Reply:
    """Return a reply that calls one tool."""
    return (ToolCall(name, fragments, call_id), Finish("tool_calls"))


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request as it arrived; header names in lower case."""

    headers: Mapping[str, str]
    body: dict[str, Any]


class ModelServer:
    """An OpenAI-compatible server on loopback; a context manager."""

    def __init__(self) -> None:
        self.requests: list[ModelRequest] = []
        self.disconnects = 0  # clients that went away during a Silence
        self.silent = 0  # replies that are in a Silence
        self._script: deque[Reply] = deque()
        self._released = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        """For OpenAIProvider(base_url=...) and OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def environment(self) -> dict[str, str]:
        """For the documentation's services, to make this their model."""
        return {"MODEL": f"openai-chat:{MODEL}", "OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": "test"}

    def script(self, *replies: Reply) -> None:
        """Queue one reply per request that will come; a request beyond them gets status 501."""
        self._script.extend(replies)

    def release(self) -> None:
        """End every Silence, this reply's and later ones'."""
        self._released.set()

    def hold(self) -> None:
        """Let a Silence be one again, after a `release()`."""
        self._released.clear()

    def reset(self) -> None:
        """Forget what was scripted and what came, for the next test of a file; replies in a Silence go on."""
        self.release()
        wait_until_sync(lambda: not self.silent, what="the end of every Silence")
        self._script.clear()
        self.requests.clear()
        self.disconnects = 0
        self.hold()

    def take(self, request: ModelRequest) -> Reply:
        """Note a request and return what the script says to it."""
        with self._lock:
            self.requests.append(request)
            return self._script.popleft() if self._script else (Refusal(501, "the test scripted no reply to this"),)

    def wait_silently(self, client: socket.socket) -> bool:
        """Wait for `release()`; return False if the client went away first."""
        with self._lock:
            self.silent += 1
        gone = False
        while not (gone or self._released.is_set() or self._closing.is_set()):
            gone = bool(select.select([client], [], [], 0.01)[0])  # it has nothing to say: readable means closed
        with self._lock:
            self.silent -= 1
            self.disconnects += gone
        return not gone

    def __enter__(self) -> Self:
        self._http = _HttpServer(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), name="model-server")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def openai_model(server: ModelServer) -> tuple[OpenAIChatModel, AsyncOpenAI]:
    """Return pydantic-ai's OpenAI model on this server, without retries, and the client to close afterwards."""
    client = AsyncOpenAI(base_url=server.base_url, api_key="test", max_retries=0)
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client)), client


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False  # so that closing the server waits for its requests

    def __init__(self, script: ModelServer) -> None:
        super().__init__(("127.0.0.1", 0), _HttpHandler)
        self.script = script


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _HttpServer

    def do_POST(self) -> None:
        self.close_connection = True  # a kept one would hold its thread until the client closes
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = _WRONG_PATH if self.path != _PATH else self.server.script.take(ModelRequest(headers, body))
        try:
            if isinstance(reply[0], Refusal):
                self._refuse(reply[0])
            elif body.get("stream"):
                self._stream(reply)
            else:
                self._send_whole(reply)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client went away, which tests do on purpose

    def _refuse(self, refusal: Refusal) -> None:
        body = {"error": {"message": refusal.message, "type": "scripted", "code": str(refusal.status)}}
        self._send_json(refusal.status, body, refusal.headers)

    def _send_whole(self, reply: Reply) -> None:
        end = next((step for step in reply if isinstance(step, Finish)), Finish())
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(step.delta for step in reply if isinstance(step, Text)) or None,
        }
        if calls := [step for step in reply if isinstance(step, ToolCall)]:
            message["tool_calls"] = [
                {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": "".join(c.fragments)}}
                for c in calls
            ]
        choice = {"index": 0, "message": message, "finish_reason": end.reason}
        self._send_json(200, {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _usage(end)})

    def _stream(self, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        calls = 0
        for step in reply:
            match step:
                case Text(delta):
                    self._chunk({"role": "assistant", "content": delta})
                case ToolCall():
                    for piece in _tool_deltas(step, calls):
                        self._chunk(piece)
                    calls += 1
                case Silence():
                    if not self.server.script.wait_silently(self.connection):
                        return
                case Finish():
                    self._finish(step)
                case CleanCut():
                    break
                case HardCut():
                    # Lingering for zero seconds turns the close into a reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    return
                case Refusal():
                    raise AssertionError("a Refusal is the first and only step of a reply")
        self.wfile.write(b"0\r\n\r\n")

    def _finish(self, end: Finish) -> None:
        self._chunk({}, finish_reason=end.reason)
        if usage := _usage(end):
            self._data(json.dumps({**_HEAD, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        self._data("[DONE]")

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self._data(json.dumps({**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}))

    def _data(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def _send_json(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


_PATH = "/v1/chat/completions"
_WRONG_PATH: Reply = (Refusal(404, f"only {_PATH} is served here: pydantic-ai calls that model class openai-chat"),)
_HEAD = {"id": "chatcmpl-test", "created": 1_700_000_000, "model": MODEL}


def _usage(end: Finish) -> dict[str, int] | None:
    if end.input_tokens is None:
        return None
    total = end.input_tokens + end.output_tokens
    return {"prompt_tokens": end.input_tokens, "completion_tokens": end.output_tokens, "total_tokens": total}


def _tool_deltas(step: ToolCall, index: int) -> Iterator[dict[str, Any]]:
    head = {"index": index, "id": step.call_id, "type": "function", "function": {"name": step.name, "arguments": ""}}
    yield {"role": "assistant", "content": None, "tool_calls": [head]}
    for fragment in step.fragments:
        yield {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
