"""`sse()`: a session's run as server-sent events, for a browser's EventSource; and what keeps any such stream open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ..redis.entry_id import format_id
from ..redis.keys import Id
from .listener import follow

_WAIT = 3.0  # seconds for a first event, as in `listen()`
_FROM_THE_START = "0"
_LINGER = 1.0  # seconds of silence after which a stream ends that is to be closed


async def sse(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    last_event_id: str | None = None,
    keep_alive: float = 15,
) -> AsyncGenerator[str, None]:
    """Yield the frames of a run's events, `id:` and `data:`, up to its `end`; a live run is followed however silent.

    Behind an `end` there is nothing: a router that finds no first frame answers 204, which is what stops an
    EventSource. One whose run was replaced meanwhile gets an `info` with `superseded_by`, and goes on with the new run
    when it connects again.

    Args:
        last_event_id: the browser's `Last-Event-ID`; goes on behind it.
        keep_alive: seconds of silence after which a comment is sent, so that proxies keep the connection.

    Raises:
        TypeError: an id or cursor of a wrong type.
        ValueError: an id or cursor that none can be.
        RedisUnavailableError: Redis could not be reached at the start; an outage later on is waited out.
    """
    frames = event_frames(scope_id, user_id, session_id, last_event_id, wait=_WAIT)
    async with aclosing(keep_open(frames, keep_alive=keep_alive)) as kept:
        async for frame in kept:
            yield frame


async def event_frames(
    scope_id: Id, user_id: Id, session_id: Id, last_event_id: str | None, *, wait: float
) -> AsyncGenerator[str, None]:
    """Yield the frames that `sse()` keeps open; `wait` seconds for the first."""
    events = follow(scope_id, user_id, session_id, wait=wait, timeout=None, after=last_event_id or None)
    async with aclosing(events):
        async for entry in events:
            # Behind a run that was replaced an EventSource goes on with the next one, from its first event: with the
            # old id it would receive the same info for ever.
            replaced = entry.made_here and "superseded_by" in entry.body
            place = _FROM_THE_START if replaced else format_id(entry.id)
            yield f"id: {place}\ndata: {entry.to_json()}\n\n"


async def keep_open(
    frames: AsyncGenerator[str, None], *, keep_alive: float, closing: asyncio.Event | None = None
) -> AsyncGenerator[str, None]:
    """Yield the frames of an event stream, and a comment after `keep_alive` seconds of silence.

    Args:
        closing: set when the process shuts down: what is stored is still sent, then the stream ends; its client
            resumes at another process.
    """
    closed = None if closing is None else asyncio.ensure_future(closing.wait())
    following: asyncio.Task[str] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(frames))
            ends = closed is not None and closed.done()
            waited = {following} if closed is None or ends else {following, closed}
            done, _ = await asyncio.wait(
                waited, timeout=_LINGER if ends else keep_alive, return_when=asyncio.FIRST_COMPLETED
            )
            if following in done:
                try:
                    frame = following.result()
                except StopAsyncIteration:
                    return
                following = None
                yield frame
            elif ends:
                return
            elif not done:
                yield ": keep-alive\n\n"
    finally:
        waiting: list[asyncio.Future[Any]] = [task for task in (following, closed) if task is not None]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await frames.aclose()
