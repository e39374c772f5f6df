"""An event stream as a response: kept open without events, ended at a shutdown, dropped where its client stalls."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..listeners.sse import KEEP_ALIVE, LiveFrames

_COMMENT = KEEP_ALIVE.encode()
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


class EventStreamResponse(StreamingResponse):
    """Answers with an event stream.

    A client that takes nothing for 30 s is disconnected, and resumes after the last event that it has. Until then the
    process holds at most the chunks of one read for it, and what the hub holds for a slow listener.

    Args:
        chunks: whole frames; closed with the response.
        keep_alive: seconds without an event after which a comment is sent, so that proxies keep the connection.
        first: sent before the chunks.
        live: new events after those of the chunks; the response takes them from here while it can.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Any, None],
        *,
        keep_alive: float,
        first: bytes = b"",
        live: LiveFrames | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Proxies must neither keep nor gather what is sent.
        super().__init__(chunks, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        self._chunks = chunks
        self._keep_alive = keep_alive
        self._first = first
        self._live = live or LiveFrames()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        await _OpenStream(self._chunks, self._live, self._keep_alive, receive, send).run()


class _OpenStream:
    """A response that is being sent: a task that sends, the request's own task that watches the client, one timer."""

    __slots__ = (
        "__weakref__",
        "_bytes_sent",
        "_bytes_taken",
        "_chunks",
        "_closing_since",
        "_comment",
        "_has_left",
        "_interrupt",
        "_is_complete",
        "_is_ending",
        "_is_sending",
        "_keep_alive",
        "_last_sent",
        "_live",
        "_loop",
        "_receive",
        "_send",
        "_taken_at",
        "_timer",
        "_transport",
    )

    def __init__(
        self,
        chunks: AsyncGenerator[bytes | str, None],
        live: LiveFrames,
        keep_alive: float,
        receive: Receive,
        send: Send,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks = chunks
        self._live = live
        self._keep_alive = keep_alive
        self._receive = receive
        self._send = send
        # uvicorn's; ASGI itself has no way to look at the bytes that wait, or to drop a connection that takes none.
        self._transport: asyncio.WriteTransport | None = getattr(getattr(receive, "__self__", None), "transport", None)
        self._interrupt = asyncio.timeout(None)
        self._comment: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_sending = False
        self._is_complete = False  # the last message is sent, though the client may not have taken everything
        self._is_ending = False  # nobody waits in `_interrupt` any more
        self._has_left = False
        self._bytes_sent = self._bytes_taken = 0
        # Times of the loop.
        self._last_sent = self._taken_at = self._loop.time()
        self._closing_since = self._last_sent if self._loop in _closing else None

    async def run(self) -> None:
        """Send all chunks, then wait until the client has taken them; return where the client has left."""
        streams = _open.setdefault(self._loop, set())
        streams.add(self)
        # The request's task is suspended below all middlewares, each of which would take part in each step of it.
        sending = self._loop.create_task(self._send_all(), name="agx-event-stream")
        sending.add_done_callback(self._stop)
        try:
            try:
                async with self._interrupt:
                    self._look()
                    await self._wait_until_gone()
            except TimeoutError:
                if not self._interrupt.expired():
                    raise
            finally:
                await self._stop_sending(sending)
            if not sending.cancelled() and (error := sending.exception()) is not None:
                raise error
            if not self._has_left:
                await self._end()
        finally:
            streams.discard(self)

    def close(self) -> None:
        """End the stream once no event comes: the process shuts down."""
        self._closing_since = self._loop.time()
        self._look()

    async def _send_all(self) -> None:
        batch: Sequence[bytes | str | None]
        while True:
            if (entries := self._live.wait()) is not None:
                batch = self._live.take(await entries)
            else:
                batch = (await anext(self._chunks, None),)
            for chunk in batch:
                if self._comment is not None:
                    await self._comment
                    self._comment = None
                if chunk is None:
                    await self._complete()
                    return
                await self._write(chunk if isinstance(chunk, bytes) else chunk.encode())
            batch, chunk = (), None  # a client that waits holds no chunk that it has received

    async def _write(self, chunk: bytes) -> None:
        self._last_sent = self._loop.time()
        self._bytes_sent += len(chunk)
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._is_sending = False

    async def _complete(self) -> None:
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self._is_sending, self._is_complete = False, True

    async def _stop_sending(self, sending: asyncio.Task[None]) -> None:
        self._is_ending = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = [sending] if self._comment is None else [sending, self._comment]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._chunks.aclose()

    async def _end(self) -> None:
        """Complete the response, and wait until the client has taken it; drop a client that takes nothing."""
        if not self._is_complete and not self._is_stalled:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STALLED_CLOSING):
                    await self._complete()
        while self._has_unsent and not self._is_stalled:
            await asyncio.sleep(_LOOK_CLOSING)
            self._note_progress()
        if self._has_unsent and self._transport is not None:
            self._transport.abort()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    await self._wait_until_gone()

    def _stop(self, _: object = None) -> None:
        if not self._is_ending:
            self._interrupt.reschedule(self._loop.time())

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
        if self._is_ending:
            return
        now = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._note_progress()
        is_idle = not self._is_sending and (self._comment is None or self._comment.done())
        silent_since = max(self._last_sent, self._closing_since or 0.0)
        if self._is_stalled or (self._closing_since is not None and is_idle and now - silent_since >= _LINGER):
            self._stop()
            return
        if is_idle and self._closing_since is None and now - self._last_sent >= self._keep_alive:
            self._comment = self._loop.create_task(self._write(_COMMENT), name="agx-event-stream-comment")
            self._last_sent = now
        due = now + (_LOOK_EVERY if self._closing_since is None else _LOOK_CLOSING)
        comment_due = self._last_sent + self._keep_alive
        self._timer = self._loop.call_at(min(due, comment_due) if comment_due > now else due, self._look)

    def _note_progress(self) -> None:
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        taken = self._bytes_sent - waiting
        if taken > self._bytes_taken or not self._has_unsent:
            self._bytes_taken, self._taken_at = taken, self._loop.time()

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = not self._is_complete
