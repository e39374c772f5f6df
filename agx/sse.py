"""`sse()`: a session's run as server-sent events, for a browser's EventSource."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from .hub import StreamEntry, format_id
from .keys import Id
from .listener import follow

_WAIT = 3.0  # seconds for a first event, as in `listen()`


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
    EventSource.

    Args:
        last_event_id: the browser's `Last-Event-ID`; goes on behind it.
        keep_alive: seconds of silence after which a comment is sent, so that proxies keep the connection.

    Raises:
        ValueError, TypeError: an id that none can be.
    """
    events = follow(scope_id, user_id, session_id, wait=_WAIT, timeout=None, after=last_event_id or None)
    following: asyncio.Task[StreamEntry] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=keep_alive)
            if not done:
                yield ": keep-alive\n\n"
                continue
            try:
                entry = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield f"id: {format_id(entry.id)}\ndata: {entry.to_json()}\n\n"
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await events.aclose()
