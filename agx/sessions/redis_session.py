"""`RedisSession`: a conversation kept in Redis, beside the runtime's keys, and the listing of a user's."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pydantic_ai.messages import ModelRequest
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import RedisUnavailableError, SessionConflictError, SessionUnknownError
from ..redis.bus import Script
from ..redis.keys import Id, SessionKeys, check_id
from ..redis.retry import COMMAND_TIMEOUT, retry
from .base import Session, StoredSession, check_title, fold_case, title_of

TTL = 30 * 86_400  # seconds until a conversation expires, from its last save
_FIRST_WAIT, _LAST_WAIT = 0.05, 1.0  # seconds between attempts of a save

# The token identifies a save, so one whose reply is lost may be sent again. A version below ours was
# brought back by a failover or an expiry: what we hold is its continuation, so nothing is lost by writing it.
_SAVE = Script("""
local held = redis.call('HMGET', KEYS[1], 'version', 'token')
if held[2] == ARGV[2] then return 1 end
if tonumber(held[1] or '0') > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1] + 1, 'token', ARGV[2], 'saved_us', ARGV[3], 'title', ARGV[4],
  'messages', ARGV[5])
if ARGV[7] ~= '' then redis.call('HSET', KEYS[1], 'parent', ARGV[7]) end
redis.call('EXPIRE', KEYS[1], ARGV[6])
return 1
""")

# Sets a field of a conversation that is there: its expiry stays. ARGV: field, value.
_SET = Script("""
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
""")


@dataclass
class RedisSession(Session):
    """A conversation kept in Redis. Optimistic: of two that loaded the same version, the second can't save.
    The prompt is stored before the agent starts.

    Args:
        scope_id: the tenant.
        user_id: whose conversation it is.
        session_id: which of the user's.
        ttl: seconds until it expires, from its last save; by default 30 days.
        parent: what a new conversation branches from.

    Raises:
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
    """

    scope_id: Id
    user_id: Id
    session_id: Id
    ttl: int = TTL
    parent: Id | None = None
    _version: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        SessionKeys.of("any", self.scope_id, self.user_id, self.session_id)
        if self.parent is not None:
            check_id(self.parent, "parent")

    async def load(self) -> None:
        """Take the conversation as it was last saved.

        Raises:
            RedisUnavailableError: Redis can't be reached.
        """
        engine, session = self._place()
        try:
            version, messages = await engine.control.execute("HMGET", session.messages, "version", "messages")
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("load the session", error) from error
        self._version = int(version or 0)
        self.msgs = []
        if messages is not None:
            self.msgs_from_json(messages)

    async def begin(self, request: ModelRequest) -> None:
        """Write the conversation with the prompt after it.

        Raises:
            SessionConflictError: someone saved it after it was loaded here.
            RedisUnavailableError: Redis did not answer within 2 s.
        """
        before, self.msgs = self.msgs, [*self.msgs, request]
        try:
            await self._write(COMMAND_TIMEOUT)
        finally:
            self.msgs = before

    async def save(self) -> None:
        """Write the conversation, through an outage of up to `lease_ttl` seconds.

        Raises:
            SessionConflictError: someone saved it after it was loaded here.
            RedisUnavailableError: the outage lasted longer.
        """
        await self._write(current_engine().config.lease_ttl)

    async def _write(self, patience: float) -> None:
        engine, session = self._place()
        token, saved_us = uuid.uuid4().hex, time.time_ns() // 1_000
        parent = "" if self.parent is None else str(self.parent)
        content = (saved_us, title_of(self), self.msgs_to_json(), self.ttl, parent)
        saved = await _persist(
            lambda: engine.control.run(_SAVE, session.messages, self._version, token, *content), patience
        )
        if not saved:
            raise SessionConflictError(session.session)
        self._version += 1
        listing = session.saved
        # A hint, which `list()` checks: a lost one is made good by the next save. It lives as long as the longest.
        engine.control.execute("ZADD", listing, saved_us, session.session)
        engine.control.execute("EXPIRE", listing, self.ttl, "NX")
        engine.control.execute("EXPIRE", listing, self.ttl, "GT")

    def _place(self) -> tuple[Engine, SessionKeys]:
        engine = current_engine()
        return engine, SessionKeys.of(engine.config.key_prefix, self.scope_id, self.user_id, self.session_id)


@dataclass(frozen=True, slots=True)
class RedisSessions:
    """The conversations of all users, in Redis; a `SessionStore`.

    Args:
        ttl: seconds until a conversation expires, from its last save; by default 30 days.
    """

    ttl: int = TTL

    def open(self, scope_id: Id, user_id: Id, session_id: Id, *, parent: Id | None = None) -> RedisSession:
        """Return a session, not yet loaded, for one `run()`.

        Args:
            parent: what a new conversation branches from.

        Raises:
            TypeError: an id is neither an int nor a str.
            ValueError: an id has a character that none may have.
        """
        return RedisSession(scope_id, user_id, session_id, self.ttl, parent)

    async def list(
        self,
        scope_id: Id,
        user_id: Id,
        *,
        limit: int = 50,
        offset: int = 0,
        search: str | None = None,
        parent: Id | None = None,
    ) -> list[StoredSession]:
        """Return a user's conversations, the last saved first.

        One that has expired meanwhile is left out, so a page may be short.

        Args:
            search: only those whose title has this text, in upper or lower case. Redis can't search the messages.
            parent: only those that branch from this one. With it, or with `search`, each title of the user is read.

        Raises:
            RedisUnavailableError: Redis can't be reached.
        """
        engine = current_engine()
        any_session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, "any")
        origin = None if parent is None else check_id(parent, "parent")
        if not search and origin is None:
            return await _read_listing(engine, any_session, offset, offset + limit - 1)
        found = [
            one
            for one in await _read_listing(engine, any_session, 0, -1)
            if origin in (None, one.parent) and fold_case(search or "") in fold_case(one.title)
        ]
        return found[offset : offset + limit]

    async def rename(self, scope_id: Id, user_id: Id, session_id: Id, title: str) -> None:
        """Give a conversation a title, which later turns do not change.

        Args:
            title: 1 to 200 characters.

        Raises:
            TextError: such a title can't be stored.
            SessionUnknownError: the user has no such conversation.
            RedisUnavailableError: Redis can't be reached.
        """
        engine, title = current_engine(), check_title(title)
        session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
        try:
            is_there = await retry(lambda: engine.control.run(_SET, session.messages, "name", title))
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("rename the session", error) from error
        if not is_there:
            raise SessionUnknownError(session.session)

    async def delete(self, scope_id: Id, user_id: Id, session_id: Id) -> bool:
        """Remove a stored conversation; returns whether it was there. Its branches stay, without a `parent`.

        `agx.delete_session()` calls it, and removes all other data of the session from Redis.

        Raises:
            RedisUnavailableError: Redis can't be reached: repeat the call.
        """
        engine = current_engine()
        session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
        branches = [
            replace(session, session=one.session_id)
            for one in await _read_listing(engine, session, 0, -1)
            if one.parent == session.session
        ]
        try:
            for branch in branches:
                await engine.control.run(_SET, branch.messages, "parent", "")
            removed = await engine.control.execute("DEL", session.messages)
            await engine.control.execute("ZREM", session.saved, session.session)
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("delete the session", error) from error
        return bool(removed)


async def _read_listing(engine: Engine, any_session: SessionKeys, first: int, last: int) -> list[StoredSession]:
    """Return the conversations at these places of a user's listing; raises RedisUnavailableError."""
    listing = any_session.saved
    try:
        members = await engine.control.execute("ZRANGE", listing, first, last, "REV")
        sessions = [replace(any_session, session=member.decode()) for member in members]
        fields = ("title", "saved_us", "name", "parent")
        rows = await asyncio.gather(
            *(engine.control.execute("HMGET", session.messages, *fields) for session in sessions)
        )
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("list the sessions", error) from error
    found = []
    for session, (title, saved_us, name, parent) in zip(sessions, rows, strict=True):
        if saved_us is None:
            engine.control.execute("ZREM", listing, session.session)
            continue
        shown, saved_at = (name or title).decode("utf-8", "replace"), _to_time(saved_us)
        found.append(StoredSession(session.session, shown, saved_at, (parent or b"").decode() or None))
    return found


def _to_time(saved_us: bytes) -> datetime:
    return datetime.fromtimestamp(int(saved_us) / 1_000_000, UTC)


async def _persist(attempt: Callable[[], Awaitable[Any]], patience: float) -> Any:
    """Return the reply of a command that may be sent again, trying for so many seconds."""
    deadline, wait = time.monotonic() + patience, _FIRST_WAIT
    while True:
        try:
            return await attempt()
        except (RedisError, OSError) as error:
            ours = type(error) is ResponseError or isinstance(error, (AuthenticationError, NoPermissionError))
            if ours or time.monotonic() + wait > deadline:
                raise RedisUnavailableError("save the session", error) from error
        await asyncio.sleep(wait)
        wait = min(wait * 2, _LAST_WAIT)
