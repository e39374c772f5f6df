"""`listen()`: follow a session's run from any process, from its first entry or behind a cursor."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any, Literal, overload

import orjson
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from ..engine.registry import current_engine
from ..engine.starting import wait_for_starting
from ..errors import RUN_LOST, RedisUnavailableError
from ..redis.entry_id import StreamId, format_id, parse_id
from ..redis.keys import Id, SessionKeys
from ..redis.redis_py import Reply
from ..stream.entry import RUNTIME, StreamEntry
from ..stream.hub import READ, Feed, Hub, Subscriber

_CURSOR = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?")
_ASK_AGAIN = 0.1  # seconds
_EXPIRED = orjson.dumps({"gap": True})
_LOST = orjson.dumps({"msg": RUN_LOST.sentence, "error_type": "lost", "code": RUN_LOST.code})


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
    run: where the session is restarted meanwhile, an `info` with `{"gap": true, "superseded_by": run_id}` is the last;
    where its process died and no sidecar closed it, an `error` with `{"error_type": "lost"}`; where its stream expired
    before all of it was read, an `info` with `{"gap": true}`.

    Args:
        wait: seconds to wait for a first event.
        timeout: seconds of silence after which it gives up.
        serialize: whether events come as JSON strings.
        after: id of the last event seen; goes on behind it.

    Raises:
        TypeError: an id or cursor of a wrong type.
        ValueError: an id or cursor that none can be.
        RedisUnavailableError: Redis could not be reached for `wait` seconds, later on for `timeout`.
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
        reader = _Reader(engine.hub, session, feed, subscriber, cursor=cursor, wait=wait)
        async for entry in reader.read(timeout=timeout):
            yield entry
    finally:
        engine.hub.leave(session, feed, subscriber)


def _parse_cursor(after: str | None) -> StreamId | None:
    if after is None:
        return None
    if isinstance(after, str) and _CURSOR.fullmatch(after):
        cursor = parse_id(after)
        if max(cursor) < 2**64 and min(cursor) < 2**64 - 1:
            # As in Redis: behind zero is from the start, which is no resumption.
            return cursor if cursor > (0, 0) else None
    raise ValueError(f"after must be the id of an event, like 1700000000000-0, not {after!r:.40}")


class _Reader:
    """One listener: catches up by reading for itself, then takes what the feed hands it."""

    def __init__(
        self,
        hub: Hub,
        session: SessionKeys,
        feed: Feed,
        subscriber: Subscriber,
        *,
        cursor: StreamId | None,
        wait: float,
    ) -> None:
        self._hub = hub
        self._session = session
        self._feed = feed
        self._subscriber = subscriber
        self._resumes = cursor is not None
        self._cursor: StreamId = cursor or (0, 0)
        self._wait = wait
        self._reached = False  # Redis has answered
        self._ask_by: float | None = asyncio.get_running_loop().time() + wait
        self._seen = False  # an entry of the run it follows
        self._lost = False

    async def read(self, *, timeout: float | None) -> AsyncGenerator[StreamEntry, None]:
        if self._resumes:
            edges = await self._read_edges()
            if edges is not None:
                first, last = edges
                if last.type == "end" and last.id <= self._cursor:
                    return
                if first.id > self._cursor:
                    self._hub.gaps += 1
                    yield (gap := _gap_before(self._cursor, first))
                    if "superseded_by" in gap.body:
                        return
        while True:
            entries = await self._take(timeout if self._seen or self._resumes else self._wait)
            if entries is None:
                if self._lost and await self._read_edges() is None:
                    # Its stream has expired before this listener has read all of it; how it ended is not known.
                    self._hub.gaps += 1
                    yield StreamEntry(self._cursor, "info", RUNTIME, _EXPIRED, made_here=True)
                elif self._lost:
                    yield StreamEntry(self._cursor, "error", RUNTIME, _LOST, made_here=True)
                return
            for entry in entries:
                if entry.id <= self._cursor:
                    continue
                if entry.type == "begin" and (self._seen or self._resumes):
                    self._hub.gaps += 1
                    yield _gap_before(self._cursor, entry)
                    return
                self._seen = True
                self._cursor = entry.id
                yield entry
                if entry.type == "end":
                    return

    async def _read_edges(self) -> tuple[StreamEntry, StreamEntry] | None:
        """Return the stream's first and last entry, if there are any."""
        stream = self._session.stream
        first = await self._ask("XRANGE", stream, "-", "+", "COUNT", 1)
        last = await self._ask("XREVRANGE", stream, "+", "-", "COUNT", 1)
        return (StreamEntry.of(*first[0]), StreamEntry.of(*last[0])) if first and last else None

    async def _ask(self, *command: str | int) -> Reply:
        """Return Redis's reply, asked for again through an outage; raises RedisUnavailableError when it is given up."""
        while True:
            try:
                reply = await self._hub.bus.execute(*command)
            except (RedisError, OSError) as error:
                late = self._ask_by is not None and asyncio.get_running_loop().time() >= self._ask_by
                if late or isinstance(error, (AuthenticationError, AuthorizationError, NoPermissionError)):
                    raise RedisUnavailableError("follow the session", error) from error
                await asyncio.sleep(_ASK_AGAIN)
            else:
                self._reached = True
                return reply

    async def _take(self, silence: float | None) -> list[StreamEntry] | None:
        """Return the next entries; None where `silence` seconds passed without one, or the run has died."""
        give_up = None if silence is None else asyncio.get_running_loop().time() + silence
        if self._reached:
            self._ask_by = give_up
        subscriber = self._subscriber
        while True:
            if subscriber.entries:
                entries = list(subscriber.entries)
                subscriber.entries.clear()
                return entries
            if not subscriber.caught_up:
                if entries := await self._catch_up():
                    return entries
                continue
            if self._feed.dead and (self._seen or self._resumes):
                # Nobody closed it in time: its process has died, and no sidecar told.
                self._lost = True
                return None
            if not await subscriber.wait(give_up):
                return None

    async def _catch_up(self) -> list[StreamEntry]:
        """Read from the own cursor; where nothing is left, let the feed hand over from there on."""
        found = await self._ask("XRANGE", self._session.stream, f"({format_id(self._cursor)}", "+", "COUNT", READ)
        if not found:
            if self._feed.cursor is None:
                self._feed.cursor = self._cursor
            # No await in between: what the feed hands out from here on reaches this listener.
            if self._cursor >= self._feed.cursor:
                self._subscriber.caught_up = True
            else:
                self._feed.wake()
        return [StreamEntry.of(*entry) for entry in found]


def _gap_before(cursor: StreamId, entry: StreamEntry) -> StreamEntry:
    """Return the info that what followed the cursor is gone; by a restart of the session, if the entry is a `begin`."""
    body: dict[str, object] = {"gap": True}
    if entry.type == "begin":
        body["superseded_by"] = str(entry.body.get("run_id", ""))
    return StreamEntry(cursor, "info", RUNTIME, orjson.dumps(body), made_here=True)
