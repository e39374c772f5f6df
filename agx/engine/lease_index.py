"""Where other processes find a lease: its deadline in `::leases`, and its session in the index of its user."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ..redis import keys
from ..redis.bus import Bus, Script
from ..redis.clock import ServerClock
from ..redis.redis_py import Reply
from .meta_publisher import MetaPublisher

# Enters members into a sorted set that expires without news, and returns how many are new.
# ARGV: expiry in seconds, then scores with their members; `NX` before them keeps those that are there.
_ENTER = Script(
    "local n = redis.call('ZADD', KEYS[1], unpack(ARGV, 2)) redis.call('EXPIRE', KEYS[1], ARGV[1]) return n"
)

Run = tuple[keys.SessionKeys, str]  # with the run's id


class LeaseIndex:
    """Writes deadlines and sessions. Both are hints: who reads them looks at the live key itself."""

    def __init__(
        self, bus: Bus, prefix: str, clock: ServerClock, meta: MetaPublisher, *, appends: Bus, ttl_ms: int
    ) -> None:
        self._bus = bus
        self._appends = appends
        self._prefix = prefix
        self._clock = clock
        self._meta = meta
        self._ttl_ms = ttl_ms

    def next_deadline(self) -> int:
        """Return when a lease expires that is taken or renewed now, in ms of the server's clock."""
        return self._clock.now_ms() + self._ttl_ms

    def enter_deadline(self, run: Run, deadline_ms: int) -> asyncio.Future[Reply]:
        """Enter the deadline of a run that has none; the reply is 1 if it had none."""
        return self._bus.run(_ENTER, self._key(run[0]), keys.INDEX_TTL, "NX", deadline_ms, _member(run))

    def move_deadlines(self, runs: Iterable[Run]) -> None:
        """Set the next deadline of each run."""
        by_key: dict[str, list[str | int]] = {}
        for run in runs:
            by_key.setdefault(self._key(run[0]), []).extend((self.next_deadline(), _member(run)))
        for key, pairs in by_key.items():
            self._bus.run(_ENTER, key, keys.INDEX_TTL, *pairs)

    def set_deadline(self, run: Run, deadline_ms: int) -> asyncio.Future[Reply]:
        """Set a run's deadline."""
        return self._bus.run(_ENTER, self._key(run[0]), keys.INDEX_TTL, deadline_ms, _member(run))

    def remove_deadline(self, run: Run) -> asyncio.Future[Reply]:
        """Remove a run's deadline: recovery does not look at the run any more."""
        return self._bus.execute("ZREM", self._key(run[0]), _member(run))

    def enter_session(self, session: keys.SessionKeys) -> asyncio.Future[Reply]:
        """Enter a session into its user's index, in the round trip of the `begin` that follows."""
        return self._appends.run(_ENTER, session.index, keys.INDEX_TTL, self._clock.now_ms(), session.session)

    def touch_session(self, session: keys.SessionKeys) -> None:
        """Set when a session was last known to be alive, for the recovery window."""
        # XX, so that `has()` finds lost data missing.
        self._bus.execute("ZADD", session.index, "XX", self._clock.now_ms(), session.session)

    def remove_session(self, session: keys.SessionKeys) -> None:
        """Remove a session from its user's index."""
        self._bus.execute("ZREM", session.index, session.session)

    async def has(self, run: Run) -> bool:
        """Return whether a run's deadline and session are still there, which no other client deletes.

        The deadline alone may have been written between a loss of data and this look, by the renewal before. The stream
        proves nothing: it is appended again within milliseconds.

        Raises:
            RedisError, OSError: not known.
        """
        # CH has ZADD count a changed deadline, XX a deadline that is there.
        renewed = self._bus.execute("ZADD", self._key(run[0]), "XX", "CH", self.next_deadline(), _member(run))
        listed = self._bus.execute("ZSCORE", run[0].index, run[0].session)
        return bool(await renewed) and await listed is not None

    def _key(self, session: keys.SessionKeys) -> str:
        return keys.leases(self._prefix, keys.partition(session.scope, self._meta.partitions or 1))


def _member(run: Run) -> str:
    session, run_id = run
    return session.lease_member(run_id)
