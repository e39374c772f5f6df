"""`delete_session()`: removes a conversation and all that Redis has of its session."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from ..control.cancellation import cancel
from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..errors import RedisUnavailableError, SessionBusyError
from ..recovery.finalize import finalize_run
from ..recovery.missing_facts import read_queued_facts
from ..recovery.recorded_run import RecordedRun
from ..redis import keys
from ..redis.bus import Script
from ..redis.keys import Id, SessionKeys
from ..redis.live_key import CLAIM, RELEASE, new_claim
from ..redis.retry import Backoff, retry
from ..runs.deferred import open_approvals
from ..sessions.base import SessionStore
from ..stream.entry import DELETED, RUNTIME, StreamEntry, to_lua_fields
from .submit import open_queue

_EXTRA_WAIT = 5.0  # seconds that a run has to end, in addition to `lease_ttl`
_CLAIM_MS = 15_000  # no run begins meanwhile; a store may be slow

# Replaces a stream by one `end`. A process that wrote the stream lately compares it with what it retains, and would
# append missing entries again. It appends nothing after an `end` of another process. ARGV: body, expiry in seconds,
# channel.
_ERASE = Script(f"""
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not top or top[2][6] == ARGV[1] then return 0 end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '=', 1, '*', {to_lua_fields("'end'", f"'{RUNTIME}'", "ARGV[1]")})
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[3], id)
return 1
""")


async def delete_session(scope_id: Id, user_id: Id, session_id: Id, *, sessions: SessionStore) -> bool:
    """Remove a conversation, and all that Redis has of its session; returns False where there is nothing of it.

    Waiting jobs of the session are removed, its live run is cancelled, and no run can begin until all is removed.
    Listeners get an `end` with `{"deleted": true}`. That entry is the last to go: after `lease_ttl` seconds no key has
    the session's id, except facts in the scope queues, which are trimmed and expire by themselves.

    Raises:
        SessionBusyError: the live run did not end within `lease_ttl` and 5 s. Nothing but waiting jobs is removed.
        RedisUnavailableError: Redis can't be reached; repeat the call.
        TypeError, ValueError: an id can't be used.
        Exception: what the store raised; repeat the call.
    """
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, scope_id, user_id, session_id)
    claim = new_claim()
    with _convert_redis_errors():
        await retry(engine.ready)
        jobs = await _claim(engine, session, claim)
    try:
        is_stored = await sessions.delete(scope_id, user_id, session_id)
        with _convert_redis_errors():
            return await _erase(engine, session) or is_stored or jobs > 0
    finally:
        await asyncio.gather(engine.control.run(RELEASE, session.live, claim), return_exceptions=True)


@contextmanager
def _convert_redis_errors() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("delete the session", error) from error


async def _claim(engine: Engine, session: SessionKeys, claim: str) -> int:
    """Cancel the live run, and claim the session so that no other run begins; returns how many jobs were removed."""
    jobs, pause, deadline = 0, Backoff(0.01, 0.5), time.monotonic() + engine.config.lease_ttl + _EXTRA_WAIT
    while True:
        jobs += await open_queue(engine, "-").remove_session(session.scope, session.user, session.session)
        await cancel(session.scope, session.user, session.session)
        if await engine.control.run(CLAIM, session.live, claim, _CLAIM_MS):
            return jobs
        if time.monotonic() > deadline:
            raise SessionBusyError(session.session)
        await asyncio.sleep(pause.next())


async def _erase(engine: Engine, session: SessionKeys) -> bool:
    """Remove what Redis has of a session; returns whether there was anything."""
    bus = engine.control
    await _finalize_runs(engine, session)
    expiry = math.ceil(engine.config.lease_ttl)  # a process retains what it wrote for so long
    erased = await bus.run(_ERASE, session.stream, DELETED, expiry, session.wake_channel)
    steered = await bus.execute("DEL", session.inbox)
    await bus.execute("ZREM", session.index, session.session)
    approvals, ids = open_approvals(engine), (session.scope, session.user, session.session)
    calls = [call.call_id for call in await approvals.read_scope(session.scope) if call.session == ids]
    if calls:
        await approvals.remove(session, calls)
    return bool(erased or steered or calls)


async def _finalize_runs(engine: Engine, session: SessionKeys) -> None:
    """Queue the facts of lost runs that no sidecar has finalized yet, and remove their deadlines."""
    bus, n = engine.control, keys.partition(session.scope, engine.queues.partitions or 1)
    leases, ours = keys.leases(session.prefix, n), session.lease_member("").encode()
    members = [member for member in await bus.execute("ZRANGE", leases, 0, -1) if member.startswith(ours)]
    if not members:
        return
    entries = [StreamEntry.of(*entry) for entry in await bus.execute("XRANGE", session.stream, "-", "+")]
    for member in members:
        run_id = member.removeprefix(ours).decode()
        run = RecordedRun.of(run_id, entries)
        queued = await read_queued_facts(bus.execute, keys.queue(session.prefix, n), run_id, run)
        for fact in finalize_run(session, run_id, run, queued).facts:
            await engine.queues.put_acknowledged(fact)
        await bus.execute("ZREM", leases, member)
