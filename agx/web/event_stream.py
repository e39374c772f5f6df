"""An event stream as a response: kept open without events, ended at a shutdown, dropped where its client stalls."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..listeners.sse import KEEP_ALIVE

_LINGER = 1.0  # seconds without an event after which a stream ends while the process shuts down
_STALLED = 30.0  # seconds in which a client has taken nothing of what was sent
_STALLED_CLOSING = 2.0  # the same while the process shuts down
_LOOK_EVERY = 5.0  # seconds between two looks at a stream, at most
_LOOK_CLOSING = 0.2  # the same while the process shuts down, or when everything is sent

_open: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[_OpenStream]] = weakref.WeakKeyDictionary()
_closing: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def close_streams() -> None:
    """End the event streams of the running loop, also later ones: each still sends what is stored."""
    loop = asyncio.get_running_loop()
    _closing.add(loop)
    for stream in _open.get(loop, ()):
        stream.close()


class EventStreamResponse(Response):
    """Answers with an event stream.

    A client that takes nothing for 30 s is disconnected, and resumes behind the last event that it has. Until then the
    process holds at most two chunks for it, and what the hub holds for a slow listener.

    Args:
        chunks: whole frames; closed with the response.
        keep_alive: seconds without an event after which a comment is sent, so that proxies keep the connection.
        first: sent before the chunks.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Any, None],
        *,
        keep_alive: float,
        first: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Proxies must neither keep nor gather what is sent.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]  # of the empty body
        self._chunks = chunks
        self._keep_alive = keep_alive
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        await _OpenStream(self._chunks, self._keep_alive, receive, send).run()


class _OpenStream:
    """A response that is being sent: its own task, one that waits for the client to leave, one timer."""

    __slots__ = (
        "__weakref__",
        "_bytes_sent",
        "_bytes_taken",
        "_chunks",
        "_closing_since",
        "_comment",
        "_gone",
        "_interrupt",
        "_is_complete",
        "_is_sending",
        "_keep_alive",
        "_last_sent",
        "_loop",
        "_receive",
        "_send",
        "_taken_at",
        "_timer",
        "_transport",
    )

    def __init__(
        self, chunks: AsyncGenerator[bytes | str, None], keep_alive: float, receive: Receive, send: Send
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks = chunks
        self._keep_alive = keep_alive
        self._receive = receive
        self._send = send
        # uvicorn's; ASGI itself has no way to look at the bytes that wait, or to drop a connection that takes none.
        self._transport: asyncio.WriteTransport | None = getattr(getattr(receive, "__self__", None), "transport", None)
        self._interrupt = asyncio.timeout(None)
        self._gone: asyncio.Task[None] | None = None
        self._comment: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_sending = self._is_complete = False
        self._bytes_sent = self._bytes_taken = 0
        # Times of the loop.
        self._last_sent = self._taken_at = self._loop.time()
        self._closing_since = self._last_sent if self._loop in _closing else None

    async def run(self) -> None:
        """Send all chunks, then wait until the client has taken them; return where the client has left."""
        streams = _open.setdefault(self._loop, set())
        streams.add(self)
        self._gone = self._loop.create_task(self._wait_until_gone(), name="agx-event-stream")
        try:
            async with self._interrupt:
                self._look()
                async for chunk in self._chunks:
                    await self._write(chunk if isinstance(chunk, bytes) else chunk.encode())
                await self._complete()
        except TimeoutError:
            if not self._interrupt.expired():
                raise
            await self._end_early()
        finally:
            streams.discard(self)
            if self._timer is not None:
                self._timer.cancel()
            tasks = [task for task in (self._gone, self._comment) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._chunks.aclose()

    def close(self) -> None:
        """End the stream once it is silent: the process shuts down."""
        self._closing_since = self._loop.time()
        self._look()

    async def _write(self, chunk: bytes) -> None:
        if self._comment is not None:
            await self._comment
            self._comment = None
        self._last_sent = self._loop.time()
        self._bytes_sent += len(chunk)
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._is_sending = False

    async def _complete(self) -> None:
        """End the response; until the client has taken it, the stream is still looked at."""
        self._is_complete = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        while self._has_unsent:  # noqa: ASYNC110 - a transport has no event for it
            await asyncio.sleep(_LOOK_CLOSING)

    async def _end_early(self) -> None:
        """End a stream that was interrupted: its client has left or takes nothing, or the process shuts down."""
        assert self._gone is not None
        if self._gone.done() and not self._is_complete:
            return
        if not self._is_complete and not self._is_stalled:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STALLED_CLOSING):
                    await self._complete()
                    return
        if self._transport is not None:
            self._transport.abort()
            await asyncio.wait({self._gone}, timeout=_LINGER)

    @property
    def _has_unsent(self) -> bool:
        if self._transport is None:
            return self._is_sending
        return self._transport.get_write_buffer_size() > 0

    @property
    def _is_stalled(self) -> bool:
        limit = _STALLED if self._closing_since is None else _STALLED_CLOSING
        since = self._taken_at if self._closing_since is None else max(self._taken_at, self._closing_since)
        return self._has_unsent and self._loop.time() - since > limit

    def _look(self) -> None:
        """Send a comment where one is due; end the stream where its client stalls, or where it is to be closed."""
        now = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._note_progress(now)
        silent_since = max(self._last_sent, self._closing_since or 0.0)
        if self._is_stalled or (self._closing_since is not None and self._is_idle and now - silent_since >= _LINGER):
            self._interrupt.reschedule(now)
            return
        if self._is_idle and now - self._last_sent >= self._keep_alive:
            self._last_sent = now
            self._comment = self._loop.create_task(self._write_comment(), name="agx-event-stream-comment")
        due = now + _LOOK_EVERY if self._closing_since is None else now + _LOOK_CLOSING
        self._timer = self._loop.call_at(min(due, max(now, self._last_sent) + self._keep_alive), self._look)

    @property
    def _is_idle(self) -> bool:
        return not self._is_sending and not self._is_complete and (self._comment is None or self._comment.done())

    def _note_progress(self, now: float) -> None:
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        taken = self._bytes_sent - waiting
        if taken > self._bytes_taken or not self._has_unsent:
            self._bytes_taken, self._taken_at = taken, now

    async def _write_comment(self) -> None:
        self._bytes_sent += len(KEEP_ALIVE)
        await self._send({"type": "http.response.body", "body": KEEP_ALIVE.encode(), "more_body": True})

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_complete:
            self._interrupt.reschedule(self._loop.time())
