"""The stream operations of the seed's API: start, stop, add, is_live and q."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import RedisError

from ..engine.engine import Engine
from ..engine.lease import Lease
from ..engine.registry import current_engine
from ..engine.starting import starting
from ..errors import RedisUnavailableError
from ..redis import keys
from ..redis.keys import Id, SessionKeys
from ..redis.live_key import parse_live
from ..redis.retry import reply_timeout, retry
from ..stream.entry import RUNTIME, Body, to_fields
from ..stream.events import UserBody, check_body, check_label, encode_body
from ..stream.writer import SessionWriter

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class ManualSession:
    """A session that `start()` opened: a lease and a writer, no run."""

    lease: Lease
    writer: SessionWriter

    def put(self, type: str, origin: str, body: Body) -> None:
        self.writer.put(type, origin, body, when="now")


def _open(scope_id: Id, user_id: Id, session_id: Id) -> tuple[Engine, SessionKeys]:
    engine = current_engine()
    return engine, SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)


async def _reach(doing: str, ask: Callable[[], Awaitable[T]]) -> T:
    try:
        return await retry(ask)
    except (RedisError, OSError) as error:
        raise RedisUnavailableError(doing, error) from error


async def start(scope_id: Id, user_id: Id, session_id: Id) -> None:
    """Open a session's stream by hand: take the lease, renewed by this process until `stop()`, and append `begin`.

    `run()` does this by itself; a session opened this way is no run: it gives no facts and no spans.

    Raises:
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have.
        SessionBusyError: it is live already.
        RedisUnavailableError: Redis can't be reached.
    """
    engine, session = _open(scope_id, user_id, session_id)
    run_id = uuid.uuid4().hex
    # A cancel shows in `is_live()`, where a driver by hand looks for it.
    lease = Lease(session, run_id, lambda reason, mark_ms: None, lambda: None)
    writer = SessionWriter(
        engine.write_side,
        session,
        retention=engine.config.retention,
        on_end=lambda end_ms: None,
        on_fenced=lambda: None,
    )
    with starting(session):
        await _reach("start the session", engine.ready)
        found = await _reach("start the session", lambda: engine.leases.acquire(lease))
        try:
            body = {"session_id": session.session, "run_id": run_id, "manual": True}
            ensure_lease = partial(engine.leases.ensure, lease)
            await writer.begin(body, origin=RUNTIME, last=found.last, ensure_lease=ensure_lease)
        except BaseException as error:
            engine.leases.forget(lease)
            if isinstance(error, (RedisError, OSError)):
                raise RedisUnavailableError("start the session", error) from error
            raise
    lease.on_retaken = writer.check_owner
    engine.sessions[session.stream] = ManualSession(lease, writer)


async def stop(scope_id: Id, user_id: Id, session_id: Id, grace_period: float = 5) -> None:
    """Close a session that `start()` opened, in this process or another: append `end`, give the lease up.

    Args:
        grace_period: seconds that the stream is still kept.

    Raises:
        RedisUnavailableError: Redis can't be reached.
        ValueError, TypeError: an id, or `grace_period`, is no such value.
    """
    if not math.isfinite(grace_period):
        raise ValueError(f"grace_period must be a number of seconds, not {grace_period}")
    engine, session = _open(scope_id, user_id, session_id)
    opened = engine.sessions.get(session.stream)
    if isinstance(opened, ManualSession):
        del engine.sessions[session.stream]
        opened.writer.tail.retention = grace_period
        opened.writer.put("end", RUNTIME, {}, when="now")
        try:
            await _reach("stop the session", opened.writer.drain)
        finally:
            opened.writer.close()
            await _reach("stop the session", lambda: engine.leases.release(opened.lease))
        return
    # Opened by another process, which may be gone: the seed's protocol, command by command.
    await _append(engine, session, "end", RUNTIME, {})
    ttl = max(1, int(grace_period))
    await _reach("stop the session", lambda: engine.control.execute("EXPIRE", session.stream, ttl))
    await _reach("stop the session", lambda: engine.control.execute("DEL", session.live))


async def add(
    scope_id: Id, user_id: Id, session_id: Id, *, type: str, origin: str, body: dict[str, Any] | None = None
) -> None:
    """Append an event to a session's stream, from any process; in its order where the session is open in this one.

    Args:
        type: `event`, `info` or `error`.
        origin: the source of the event, any name.
        body: what listeners get; a JSON object.

    Raises:
        BodyError: the body is not a JSON object.
        TypeError: an id, `type` or `origin` is of another type.
        ValueError: an id has a character that none may have; `type` or `origin` has a lone surrogate; `type` is
            `resume`, or is `begin` or `end` while the session has a live run in this process.
        RedisUnavailableError: Redis can't be reached. A session that is open here takes it and appends it later.
    """
    check_label("type", type)
    check_label("origin", origin)
    if type == "resume":
        raise ValueError("only a process that resumes a run appends 'resume': add an `event`, an `info` or an `error`")
    await append(scope_id, user_id, session_id, type=type, origin=origin, body=check_body({} if body is None else body))


async def append(scope_id: Id, user_id: Id, session_id: Id, *, type: str, origin: str, body: Body) -> None:
    """Append an event whose body may hold any value; see `add()`."""
    engine, session = _open(scope_id, user_id, session_id)
    opened = engine.sessions.get(session.stream)
    if opened is not None and type not in ("begin", "end"):
        opened.put(type, origin, body)
        return
    if opened is not None and not isinstance(opened, ManualSession):
        raise ValueError(f"a run appends its own {type!r}: add an `event`, an `info` or an `error`")
    await _append(engine, session, type, origin, body)


async def _append(engine: Engine, session: SessionKeys, type: str, origin: str, body: Body) -> None:
    config = engine.config
    own_seq = b"" if isinstance(body, UserBody) and body.is_ambiguous(origin) else None
    fields = to_fields(type, origin, encode_body(body, config.max_body), own_seq)
    try:
        # Once only: a second entry could not be distinguished from the first.
        async with reply_timeout():
            appended = engine.control.execute(
                "XADD", session.stream, "MAXLEN", "~", config.max_stream_length, "*", *fields
            )
            engine.control.execute("EXPIRE", session.stream, keys.STREAM_TTL)
            entry_id = await appended
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("add the event", error) from error
    engine.control.execute("PUBLISH", session.wake_channel, entry_id)


async def is_live(scope_id: Id, user_id: Id, session_id: Id) -> bool:
    """Return whether a session is live and not cancelled.

    A run whose process died is live as long as another process can resume it.

    Raises:
        RedisUnavailableError: Redis can't be reached.
    """
    engine, session = _open(scope_id, user_id, session_id)
    held = await _reach("look at the session", lambda: engine.control.execute("GET", session.live))
    if held is None:
        return await _reach("look at the session", lambda: engine.is_recoverable(session))
    return parse_live(held).kind != "cancelled"


async def q(scope_id: Id, user_id: Id) -> AsyncGenerator[tuple[Id, Id, str], None]:
    """Yield `(scope_id, user_id, session_id)` of a user's live sessions.

    Raises:
        RedisUnavailableError: Redis can't be reached.
    """
    engine = current_engine()
    prefix = engine.config.key_prefix
    index = SessionKeys.of(prefix, scope_id, user_id, "any").index
    members = await _reach("list the sessions", lambda: engine.control.execute("ZRANGE", index, 0, -1))
    sessions = [SessionKeys.of(prefix, scope_id, user_id, member.decode()) for member in members]
    alive = await _reach(
        "list the sessions",
        lambda: asyncio.gather(*(engine.control.execute("EXISTS", session.live) for session in sessions)),
    )
    for session, live in zip(sessions, alive, strict=True):
        if live or await _reach("list the sessions", partial(engine.is_recoverable, session)):
            yield scope_id, user_id, session.session
        else:
            # A run that died left its entry: the index is a hint and heals here.
            engine.control.execute("ZREM", index, session.session)
