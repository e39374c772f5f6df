"""`listen()`: follow a session's run from any process, from its first entry or after a cursor."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any, Literal, overload

import orjson
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from ..engine.registry import current_engine
from ..engine.starting import wait_for_starting
from ..error_codes import RUN_LOST
from ..errors import RedisUnavailableError
from ..redis.entry_id import StreamId, format_id, parse_id
from ..redis.keys import Id, SessionKeys
from ..redis.redis_py import Reply
from ..stream.entry import RUNTIME, StreamEntry
from ..stream.hub import READ, Hub

_CURSOR = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?")
_ASK_AGAIN = 0.1  # seconds
_NEVER = float("inf")
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
        timeout: seconds without an event after which it gives up.
        serialize: whether events come as JSON strings.
        after: id of the last event seen; goes on after it.

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
    with await join(scope_id, user_id, session_id, wait=wait, timeout=timeout, after=after) as run:
        while (entries := await run.next()) is not None:
            for entry in entries:
                yield entry


async def join(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    wait: float,
    timeout: float | None,
    after: str | None,
    idle: float | None = None,
    whole_session: bool = False,
) -> Follower:
    """Return a follower of a session's run, a context manager; see `Follower.next()` for `idle`.

    With `whole_session` it goes on after the run's end with the session's next runs. `wait` and `timeout` then limit
    only how long Redis may not answer.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    cursor = _parse_cursor(after)
    await wait_for_starting(session)
    return Follower(
        engine.hub, session, cursor=cursor, wait=wait, timeout=timeout, idle=idle, whole_session=whole_session
    )


def _parse_cursor(after: str | None) -> StreamId | None:
    if after is None:
        return None
    if isinstance(after, str) and _CURSOR.fullmatch(after):
        cursor = parse_id(after)
        if max(cursor) < 2**64 and min(cursor) < 2**64 - 1:
            # As in Redis: after zero is from the start, which is no resumption.
            return cursor if cursor > (0, 0) else None
    raise ValueError(f"after must be the id of an event, like 1700000000000-0, not {after!r:.40}")


class Follower:
    """One listener: catches up by reading for itself, then takes what the feed hands it."""

    def __init__(
        self,
        hub: Hub,
        session: SessionKeys,
        *,
        cursor: StreamId | None,
        wait: float,
        timeout: float | None,
        idle: float | None,
        whole_session: bool,
    ) -> None:
        self._hub = hub
        self._session = session
        self._feed, self._subscriber = hub.join(session)
        self._whole_session = whole_session
        self._cursor: StreamId = cursor or (0, 0)
        self._wait = wait
        self._timeout = timeout
        self._idle = idle
        self._clock = asyncio.get_running_loop().time
        # Times of the loop.
        self._idle_at = _NEVER  # then `idle` is reported
        self._give_up_at: float | None = None  # then the listener ends; None until the wait for the next entries begins
        self._ask_by = self._clock() + wait  # Redis is asked again until then
        self._reached = False  # Redis has answered
        self._checked = cursor is None  # whether the stream still has what follows the cursor
        self._between_runs = cursor is None  # no run is under way, by the entries read so far
        self._ended = False

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._hub.leave(self._session, self._feed, self._subscriber)

    async def next(self) -> list[StreamEntry] | None:
        """Return the next entries of the run; None where none is to come.

        An empty list reports `idle` seconds without an entry.

        Raises:
            RedisUnavailableError: Redis could not be reached for `wait` seconds, later on for `timeout`.
        """
        if self._idle is not None:
            self._idle_at = self._clock() + self._idle
        if self._give_up_at is None:
            timeout = self._wait if self._between_runs and not self._whole_session else self._timeout
            self._give_up_at = _NEVER if timeout is None else self._clock() + timeout
            if self._reached:
                self._ask_by = self._give_up_at
        try:
            if not self._checked and (gap := await self._check_cursor()) is not None:
                return [gap]
            subscriber = self._subscriber
            while not self._ended:
                if subscriber.entries:
                    entries = subscriber.take()
                elif not subscriber.caught_up:
                    entries = await self._catch_up()
                elif self._feed.dead and not self._between_runs:
                    lost = await self._report_loss()
                    self._end_run()
                    self._give_up_at = None
                    return [lost]
                else:
                    # Not in a coroutine of its own, which would be one more to resume for each listener and event.
                    subscriber.waits_for_run = self._whole_session and self._between_runs
                    arrived = await subscriber.wait(min(self._give_up_at, self._idle_at))
                    if arrived is None and self._clock() < self._give_up_at:
                        return []
                    self._ended = arrived is None
                    entries = arrived or []
                if selected := self.select(entries):
                    self._give_up_at = None
                    return selected
        except _SilenceError:
            return []
        return None

    def wait_entries(self) -> asyncio.Future[list[StreamEntry] | None] | None:
        """Return a future of new entries for `select()`; None if `next()` has to be called first."""
        subscriber = self._subscriber
        has_limits = self._idle is not None or self._timeout is not None or self._between_runs
        if has_limits or self._ended or self._feed.dead or subscriber.entries or not subscriber.caught_up:
            return None
        subscriber.waits_for_run = False
        return subscriber.wait(_NEVER)

    async def _check_cursor(self) -> StreamEntry | None:
        """Return a gap where the stream has lost what followed the cursor."""
        edges = await self._read_edges()
        self._checked = True
        if edges is None:
            self._between_runs = self._whole_session
            return None
        first, last = edges
        if last.type == "end" and last.id <= self._cursor:
            self._end_run()
        elif first.id > self._cursor:
            return self._report_gap(first)
        return None

    def select(self, entries: list[StreamEntry]) -> list[StreamEntry]:
        """Return those of the run that are after the cursor; after an `end`, or another run's `begin`, it is over."""
        selected = []
        for entry in entries:
            if entry.id <= self._cursor and not entry.made_here:
                continue
            if entry.type == "begin" and not self._between_runs:
                selected.append(self._report_gap(entry))
                if self._ended:
                    break
            self._between_runs = False
            self._cursor = entry.id
            selected.append(entry)
            if entry.type == "end":
                self._end_run()
                if self._ended:
                    break
        return selected

    def _end_run(self) -> None:
        """Wait for the session's next run if the whole session is followed; else end."""
        self._between_runs = True
        self._ended = not self._whole_session

    def _report_gap(self, entry: StreamEntry) -> StreamEntry:
        """Return the info that what followed the cursor is gone; a `begin` has replaced it."""
        self._hub.gaps += 1
        body: dict[str, object] = {"gap": True}
        if entry.type == "begin":
            body["superseded_by"] = str(entry.body.get("run_id", ""))
            self._end_run()
        return StreamEntry(self._cursor, "info", RUNTIME, orjson.dumps(body), made_here=True)

    async def _report_loss(self) -> StreamEntry:
        """Return how a run ended whose process has died, and which nobody has closed in time."""
        if await self._read_edges() is None:
            # Its stream has expired before this listener has read all of it; how it ended is not known.
            self._hub.gaps += 1
            return StreamEntry(self._cursor, "info", RUNTIME, _EXPIRED, made_here=True)
        return StreamEntry(self._cursor, "error", RUNTIME, _LOST, made_here=True)

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
                reply = await self._hub.bus.execute(*command, as_sent=True)
            except (RedisError, OSError) as error:
                late = self._clock() >= self._ask_by
                if late or isinstance(error, (AuthenticationError, AuthorizationError, NoPermissionError)):
                    raise RedisUnavailableError("follow the session", error) from error
                await asyncio.sleep(_ASK_AGAIN)
                if self._clock() >= self._idle_at:
                    raise _SilenceError from None
            else:
                self._reached = True
                return reply

    async def _catch_up(self) -> list[StreamEntry]:
        """Read from the own cursor; where nothing is left, let the feed hand over from there on."""
        feed, cursor = self._feed, self._cursor
        handed_out, early = feed.cursor, feed.early_wake_ups
        found = await self._ask("XRANGE", self._session.stream, f"({format_id(cursor)}", "+", "COUNT", READ)
        if not found:
            if feed.cursor is None:
                feed.cursor = cursor
                if feed.early_wake_ups > early:  # their entries may have been appended after this read
                    feed.read_soon()
            elif feed.cursor == handed_out:
                feed.go_back(cursor)
            # No await in between: what the feed hands out from here on reaches this listener.
            self._subscriber.caught_up = cursor >= feed.cursor
        return [StreamEntry.of(*entry) for entry in found]


class _SilenceError(Exception):
    """`idle` seconds have passed without an entry."""
