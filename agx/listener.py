"""`listen()`: follow a session's run from any process, from its first entry or behind a cursor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Literal, overload

import orjson
from redis.exceptions import RedisError

from .engine import current_engine, wait_for_starting
from .events import RUNTIME
from .hub import READ, Feed, Hub, StreamEntry, StreamId, Subscriber, format_id, parse_id
from .keys import Id, SessionKeys

_LIVE_CHECK = 1.0  # seconds of silence after which a follower looks whether the run still lives


@overload
def listen(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    wait: float = 3,
    timeout: float = 60,
    serialize: Literal[True] = True,
    after: str | None = None,
) -> AsyncGenerator[str, None]: ...
@overload
def listen(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    wait: float = 3,
    timeout: float = 60,
    serialize: Literal[False],
    after: str | None = None,
) -> AsyncGenerator[dict[str, Any], None]: ...
async def listen(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    wait: float = 3,
    timeout: float = 60,
    serialize: bool = True,
    after: str | None = None,
) -> AsyncGenerator[str | dict[str, Any], None]:
    """Yield the events of a session's run, up to and including its `end`.

    Each is `{"id", "type", "origin", "body"}`: a JSON string, or a dict with `serialize=False`. A listener follows one
    run: where the session is restarted meanwhile, an `info` with `{"gap": true, "superseded_by": run_id}` is the last.

    Args:
        wait: seconds to wait for a first event.
        timeout: seconds of silence after which it gives up.
        serialize: whether events come as JSON strings.
        after: id of the last event seen; goes on behind it.

    Raises:
        ValueError, TypeError: an id or cursor that none can be.
    """
    async for entry in follow(scope_id, user_id, session_id, wait=wait, timeout=timeout, after=after):
        yield entry.to_json() if serialize else entry.to_dict()


async def follow(
    scope_id: Id, user_id: Id, session_id: Id, *, wait: float, timeout: float | None, after: str | None
) -> AsyncGenerator[StreamEntry, None]:
    """Yield the entries of a run. `timeout=None` follows a live run however silent it is."""
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    cursor = _parse_cursor(after)
    await wait_for_starting(session)
    feed, subscriber = engine.hub.join(session)
    try:
        reader = _Reader(engine.hub, session, feed, subscriber, cursor)
        async for entry in reader.read(wait=wait, timeout=timeout):
            yield entry
    finally:
        engine.hub.leave(session, feed, subscriber)


def _parse_cursor(after: str | None) -> StreamId | None:
    if after is None:
        return None
    try:
        return parse_id(after)
    except (ValueError, AttributeError):
        raise ValueError(f"after must be the id of an event, like 1700000000000-0, not {str(after)[:40]!r}") from None


class _Reader:
    """One listener: catches up by reading for itself, then takes what the feed hands it."""

    def __init__(
        self, hub: Hub, session: SessionKeys, feed: Feed, subscriber: Subscriber, cursor: StreamId | None
    ) -> None:
        self._hub = hub
        self._session = session
        self._feed = feed
        self._subscriber = subscriber
        self._resumes = cursor is not None
        self._cursor: StreamId = cursor or (0, 0)
        self._seen = False  # an entry of the run it follows

    async def read(self, *, wait: float, timeout: float | None) -> AsyncGenerator[StreamEntry, None]:
        if self._resumes and (gap := await self._check_gap()) is not None:
            yield gap
            if "superseded_by" in gap.body:
                return
        while True:
            entries = await self._take(self._silence(wait, timeout), follows_live=timeout is None)
            if entries is None:
                return
            for entry in entries:
                if entry.id <= self._cursor:
                    continue
                if entry.type == "begin" and (self._seen or self._resumes):
                    self._hub.gaps += 1
                    yield _gap(self._cursor, superseded_by=str(entry.body.get("run_id", "")))
                    return
                self._seen = True
                self._cursor = entry.id
                yield entry
                if entry.type == "end":
                    return

    def _silence(self, wait: float, timeout: float | None) -> float:
        if not self._seen and not self._resumes:
            return wait
        return _LIVE_CHECK if timeout is None else timeout

    async def _check_gap(self) -> StreamEntry | None:
        """Return the info that entries behind the cursor are gone, if they are."""
        try:
            first = await self._hub.bus.execute("XRANGE", self._session.stream, "-", "+", "COUNT", 1)
        except (RedisError, OSError):
            return None
        if not first:
            return None
        entry = StreamEntry.of(*first[0])
        if entry.id <= self._cursor:
            return None
        self._hub.gaps += 1
        if entry.type == "begin":
            return _gap(self._cursor, superseded_by=str(entry.body.get("run_id", "")))
        return _gap(self._cursor)

    async def _take(self, silence: float, *, follows_live: bool) -> list[StreamEntry] | None:
        """Return the next entries, or None where `silence` seconds passed without one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + silence
        subscriber, feed = self._subscriber, self._feed
        while True:
            if subscriber.entries:
                entries = list(subscriber.entries)
                subscriber.entries.clear()
                return entries
            if not subscriber.caught_up:
                if entries := await self._catch_up():
                    return entries
                continue
            subscriber.news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await subscriber.news.wait()
            except TimeoutError:
                if subscriber.entries:
                    continue
                if not (follows_live and self._seen and await self._is_live()):
                    feed.wake()
                    return None
                deadline = loop.time() + silence

    async def _catch_up(self) -> list[StreamEntry]:
        """Read from the own cursor; where nothing is left, let the feed hand over from there on."""
        try:
            found = await self._hub.bus.execute(
                "XRANGE", self._session.stream, f"({format_id(self._cursor)}", "+", "COUNT", READ
            )
        except (RedisError, OSError):
            await asyncio.sleep(0.1)
            return []
        if not found:
            if self._feed.cursor is None:
                self._feed.cursor = self._cursor
            # No await in between: what the feed hands out from here on reaches this listener.
            if self._cursor >= self._feed.cursor:
                self._subscriber.caught_up = True
            else:
                self._feed.wake()
        return [StreamEntry.of(*entry) for entry in found]

    async def _is_live(self) -> bool:
        try:
            return await self._hub.bus.execute("GET", self._session.live) is not None
        except (RedisError, OSError):
            return True  # an outage is no death


def _gap(cursor: StreamId, **more: str) -> StreamEntry:
    return StreamEntry(cursor, "info", RUNTIME, orjson.dumps({"gap": True, **more}))
