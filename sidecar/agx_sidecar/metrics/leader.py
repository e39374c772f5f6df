"""Elects the one replica that exports the fleet's metrics, and guards the metric state against all others.

There are two locks. The lease (`::leader`, expires by itself) decides which replica leads. The epoch in the state's
header decides which replica owns the state: a leader that was paused or disconnected writes nothing when it resumes
(contract, section 7).
"""

from __future__ import annotations

import logging
import time
import uuid

from agx.redis import keys

from ..link import Link
from .state import (
    FORMAT,
    HEADER_LENGTH,
    RELEASED,
    Header,
    NewerStateError,
    UnreadableStateError,
    parse_header,
)

logger = logging.getLogger(__name__)

# Replies {verdict, server ms, ms that another's lease still has}.
_LEASE_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {'kept', now, 0}
elseif owner then
  return {'other', now, redis.call('PTTL', KEYS[1])}
elseif ARGV[3] == '1' then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return {'taken', now, 0}
end
return {'free', now, 0}
"""

_RELEASE_SCRIPT = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

# ARGV: the header that was seen, our header, TTL, '1' to drop the body.
_CLAIM_SCRIPT = """
local seen = redis.call('GETRANGE', KEYS[1], 0, #ARGV[2] - 1)
if seen ~= ARGV[1] then return 0 end
if seen == '' or ARGV[4] == '1' then
  redis.call('SET', KEYS[1], ARGV[2])
else
  redis.call('SETRANGE', KEYS[1], 0, ARGV[2])
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""

# ARGV: our header, our epoch, what to write, TTL. A lower epoch is an old state that Redis restored: ours is newer.
_WRITE_SCRIPT = """
local seen = redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1)
if seen ~= '' and seen ~= ARGV[1] then
  local epoch = tonumber(string.sub(seen, 16, 31))
  if not epoch or epoch >= tonumber(ARGV[2]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[3], 'EX', ARGV[4])
return 1
"""


class StoodDownError(Exception):
    """This replica no longer leads; another one owns the state."""


class Lease:
    """The leader's lease. Its ownership is confirmed only while `held`, by this replica's clock since its request."""

    def __init__(self, link: Link, prefix: str, length: float) -> None:
        self.owner = uuid.uuid4().hex
        self.length = length
        self._link = link
        self._key = keys.leader(prefix)
        self._state_key = keys.metrics(prefix)
        self._held_until = float("-inf")
        self._not_before = float("-inf")

    @property
    def held(self) -> bool:
        return time.monotonic() < self._held_until

    async def take(self) -> bool:
        """Try once to become the leader.

        A lease that vanished before it expired was lost by Redis, not released. Its owner gets the rest of that time to
        renew it, because it alone has counts that Redis may have lost too. The state's header shows a release.
        """
        asked = time.monotonic()
        verdict, rest = await self._ask(may_take=asked >= self._not_before)
        if verdict == "other":
            self._not_before = asked + rest / 1000
        elif verdict == "free" and await self._was_released():
            self._not_before = asked
        elif verdict in {"taken", "kept"}:
            self._held_until = asked + self.length
            return True
        return False

    async def renew(self) -> bool:
        """Renew the lease; returns False if it had expired and was taken again, so another may have led in between.

        Raises:
            StoodDownError: another replica leads.
        """
        asked = time.monotonic()
        verdict, _ = await self._ask(may_take=True)
        if verdict == "other":
            self._held_until = float("-inf")
            raise StoodDownError("another replica took the lease")
        if verdict == "kept":
            self._held_until = asked + self.length
            return True
        return False

    def confirm(self, asked: float) -> None:
        """Confirm a lease that was taken again at `asked` (monotonic), once the state is known to be ours still."""
        self._held_until = asked + self.length

    async def release(self) -> None:
        """Release the lease, if it is ours."""
        self._held_until = float("-inf")
        await self._link.call("EVAL", _RELEASE_SCRIPT, 1, self._key, self.owner)

    async def _ask(self, *, may_take: bool) -> tuple[str, int]:
        milliseconds = int(self.length * 1000)
        reply = await self._link.call(
            "EVAL", _LEASE_SCRIPT, 1, self._key, self.owner, milliseconds, "1" if may_take else "0"
        )
        self._link.set_clock(int(reply[1]))
        return reply[0].decode(), int(reply[2])

    async def _was_released(self) -> bool:
        seen = await self._link.call("GETRANGE", self._state_key, 0, HEADER_LENGTH - 1)
        try:
            return parse_header(seen).owner == RELEASED
        except UnreadableStateError:
            return False


class StateGuard:
    """The metric state in Redis, after its owner's header."""

    def __init__(self, link: Link, prefix: str, owner: str) -> None:
        self._link = link
        self._key = keys.metrics(prefix)
        self._owner = owner
        self._header = Header(0, owner)  # no epoch: nothing is ours before `claim`

    async def claim(self) -> bytes:
        """Take ownership of the state and return its body, empty where there is none or it has no header.

        Raises:
            NewerStateError: a newer version wrote it.
            StoodDownError: another replica claimed it at the same time.
        """
        data: bytes = await self._link.call("GET", self._key) or b""
        drop = False
        epoch = 0
        if data:
            try:
                seen = parse_header(data)
            except UnreadableStateError as error:
                await self.set_aside(data, error)
                drop = True
            else:
                if seen.format > FORMAT:
                    raise NewerStateError(f"its format is {seen.format}, ours {FORMAT}")
                epoch = seen.epoch
        header = Header(epoch + 1, self._owner)
        claimed = await self._link.call(
            "EVAL",
            _CLAIM_SCRIPT,
            1,
            self._key,
            data[:HEADER_LENGTH],
            header.encode(),
            keys.STATE_TTL,
            "1" if drop else "0",
        )
        if not claimed:
            raise StoodDownError("another replica claimed the metric state")
        self._header = header
        return b"" if drop else data[HEADER_LENGTH:]

    async def set_aside(self, data: bytes, why: Exception) -> None:
        """Copy a state that can't be read to another key, and log it."""
        aside = f"{self._key}:unreadable"
        await self._link.call("SET", aside, data, "EX", keys.STATE_TTL)
        logger.error("the metric state can't be read (%s): it is copied to %s, and all counters restart", why, aside)

    async def write(self, body: bytes) -> None:
        """Write the state; raises StoodDownError if it is another's."""
        await self._write(self._header, body)

    async def hand_over(self, body: bytes) -> None:
        """Write the state a last time, marked as released so that a successor need not wait."""
        await self._write(Header(self._header.epoch, RELEASED), body)

    async def check(self) -> None:
        """Raise StoodDownError if the state is another's by now."""
        seen = await self._link.call("GETRANGE", self._key, 0, HEADER_LENGTH - 1)
        if seen and seen != self._header.encode() and parse_header(seen).epoch >= self._header.epoch:
            raise StoodDownError("another replica led in the meantime")

    async def _write(self, header: Header, body: bytes) -> None:
        ours = self._header
        data = header.encode() + body
        if not await self._link.call(
            "EVAL", _WRITE_SCRIPT, 1, self._key, ours.encode(), ours.epoch, data, keys.STATE_TTL
        ):
            raise StoodDownError("the metric state is another replica's")
