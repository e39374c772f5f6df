"""`RedisSession`: a conversation kept in Redis, beside the runtime's keys, and the listing of a user's."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_ai.messages import ModelRequest
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import RedisUnavailableError, SessionConflictError
from ..redis.bus import Script
from ..redis.keys import Id, SessionKeys
from ..redis.retry import COMMAND_TIMEOUT
from .base import Session, StoredSession, title_of

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
redis.call('EXPIRE', KEYS[1], ARGV[6])
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

    Raises:
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
    """

    scope_id: Id
    user_id: Id
    session_id: Id
    ttl: int = TTL
    _version: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        SessionKeys.of("any", self.scope_id, self.user_id, self.session_id)

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
        """Write the conversation with the prompt behind it.

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
        content = (saved_us, title_of(self), self.msgs_to_json(), self.ttl)
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

    def open(self, scope_id: Id, user_id: Id, session_id: Id) -> RedisSession:
        """Return a session, not yet loaded, for one `run()`.

        Raises:
            TypeError: an id is neither an int nor a str.
            ValueError: an id has a character that none may have.
        """
        return RedisSession(scope_id, user_id, session_id, self.ttl)

    async def list(self, scope_id: Id, user_id: Id, *, limit: int = 50, offset: int = 0) -> list[StoredSession]:
        """Return a user's conversations, the last saved first.

        One that has expired meanwhile is left out, so a page may be short.

        Raises:
            RedisUnavailableError: Redis can't be reached.
        """
        engine = current_engine()
        prefix = engine.config.key_prefix
        listing = SessionKeys.of(prefix, scope_id, user_id, "any").saved
        try:
            members = await engine.control.execute("ZRANGE", listing, offset, offset + limit - 1, "REV")
            sessions = [SessionKeys.of(prefix, scope_id, user_id, member.decode()) for member in members]
            rows = await asyncio.gather(
                *(engine.control.execute("HMGET", session.messages, "title", "saved_us") for session in sessions)
            )
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("list the sessions", error) from error
        found = []
        for session, (title, saved_us) in zip(sessions, rows, strict=True):
            if saved_us is None:
                engine.control.execute("ZREM", listing, session.session)
                continue
            saved_at = datetime.fromtimestamp(int(saved_us) / 1_000_000, UTC)
            found.append(StoredSession(session.session, title.decode("utf-8", "replace"), saved_at))
        return found


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
