"""`sse()`: a session's run as server-sent events, for a browser's EventSource."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from ..redis.keys import Id
from ..stream.entry import StreamEntry
from .listener import Follower, join

KEEP_ALIVE = ": keep-alive\n\n"
_WAIT = 3.0  # seconds for a first event, as in `listen()`
_MAX_CHUNK = 65_536  # bytes of a chunk that has more than one frame


async def sse(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    last_event_id: str | None = None,
    keep_alive: float = 15,
) -> AsyncGenerator[str, None]:
    """Yield the frames of a run's events, `id:` and `data:`, up to its `end`; a live run is followed however silent.

    After an `end` there is nothing: a router that finds no first frame answers 204, which is what stops an
    EventSource. One whose run was replaced meanwhile gets an `info` with `superseded_by`, and goes on with the new run
    when it connects again.

    Args:
        last_event_id: the browser's `Last-Event-ID`; goes on after it.
        keep_alive: seconds without an event after which a comment is sent, so that proxies keep the connection.

    Raises:
        TypeError: an id or cursor of a wrong type.
        ValueError: an id or cursor that none can be.
        RedisUnavailableError: Redis could not be reached at the start; an outage later on is waited out.
    """
    after = last_event_id or None
    with await join(scope_id, user_id, session_id, wait=_WAIT, timeout=None, after=after, idle=keep_alive) as run:
        while (entries := await run.next()) is not None:
            if not entries:
                yield KEEP_ALIVE
            for entry in entries:
                yield entry.to_frame().decode()


async def event_chunks(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    last_event_id: str | None,
    *,
    wait: float,
    whole_session: bool = False,
    live: LiveFrames | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield the frames of `sse()` as a response writes them: those that are there together, up to 64 KiB.

    `wait`: seconds for the first event. With `whole_session` the frames of the session's next runs follow.
    The response adds the comments that keep the connection open. After each chunk it may take the frames of new events
    from `live`, until `live.wait()` returns None.
    """
    after = last_event_id or None
    live = live or LiveFrames()
    with await join(
        scope_id, user_id, session_id, wait=wait, timeout=None, after=after, whole_session=whole_session
    ) as run:
        while (entries := await run.next()) is not None:
            *others, chunk = _join_frames(entries)
            entries = []  # a client that waits for the next event holds no entry of a long replay
            while others:
                yield others.pop(0)
            live.run = run  # the last chunk of what the run has returned: after it the response may use `live`
            yield chunk
            live.run, chunk = None, b""


class LiveFrames:
    """The frames of new events, for a response that has sent what `event_chunks()` has yielded so far.

    The response awaits the future itself. Each coroutine or generator between them takes a microsecond for each event.
    """

    __slots__ = ("run",)

    def __init__(self) -> None:
        self.run: Follower | None = None

    def wait(self) -> asyncio.Future[list[StreamEntry] | None] | None:
        """Return a future of new entries for `take()`; None if the next frames come from the generator."""
        return None if self.run is None else self.run.wait_entries()

    def take(self, entries: list[StreamEntry] | None) -> list[bytes]:
        """Return the chunks of new entries."""
        return [] if self.run is None else _join_frames(self.run.select(entries or []))


def _join_frames(entries: list[StreamEntry]) -> list[bytes]:
    """Return the frames as chunks of up to 64 KiB; a larger frame is a chunk of its own."""
    if len(entries) == 1:  # nearly always, for each client and event
        return [entries[0].to_frame()]
    chunks: list[bytes] = []
    frames: list[bytes] = []
    size = 0
    for entry in entries:
        frame = entry.to_frame()
        if frames and size + len(frame) > _MAX_CHUNK:
            chunks.append(b"".join(frames))
            frames, size = [], 0
        frames.append(frame)
        size += len(frame)
    if frames:
        chunks.append(b"".join(frames))
    return chunks
