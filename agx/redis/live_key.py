"""A session's live key: the codec of its value and the scripts that change it (contract, section 4).

The value states who holds the session's lease:

| value | kind | meaning |
|---|---|---|
| `{holder}` | `held` | the run's process is alive |
| `cancel:{holder}:{server ms}` | `cancelled` | the same, and the run is to stop; the TTL does not change |
| `reaper:{token}` | `claimed` | a recovery looks whether the last run was lost; nothing is decided yet |
| `1` | `foreign` | a client of the older package holds the session |
| anything else | `unreadable` | the meaning is unknown; it is left alone |

A holder is `{run_id}`, or `{run_id}~{attempt}.{nonce}` where several processes may try the run. Attempt 0 is no
process's: it marks a cancel that came after a run's process died and before another process went on with the run.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Literal

from .bus import Script

Kind = Literal["held", "cancelled", "claimed", "foreign", "unreadable"]

CLAIM_MS = 5_000  # TTL of a claim

_HOLDER = re.compile(r"[A-Za-z0-9_.@=+|~-]{1,300}")
_ATTEMPT = re.compile(r"(.+)~([0-9]{1,9})\.[A-Za-z0-9]+")
_MARK = re.compile(r"cancel:([^:]+):([0-9]{1,15})")
_CLAIM_PREFIX = "reaper:"
_FOREIGN = "1"
_NOBODY = 0  # the attempt of a mark that no process holds


@dataclass(frozen=True, slots=True)
class LeaseValue:
    """A parsed value. Only `held` and `cancelled` values have a holder; only `cancelled` ones have a mark."""

    kind: Kind
    holder: str | None = None
    mark_ms: int | None = None  # server time of the first `cancel()`

    @property
    def run_id(self) -> str | None:
        """The run that holds the lease, whichever attempt."""
        if self.holder is None:
            return None
        found = _ATTEMPT.fullmatch(self.holder)
        return self.holder if found is None else found[1]

    @property
    def attempt(self) -> int:
        """The number of the holder's attempt; 1 for a plain run id."""
        found = None if self.holder is None else _ATTEMPT.fullmatch(self.holder)
        return 1 if found is None else int(found[2])

    @property
    def is_gap_mark(self) -> bool:
        """Whether the run was cancelled while no process had it: the next one ends it."""
        return self.kind == "cancelled" and self.attempt == _NOBODY

    @property
    def is_anothers(self) -> bool:
        """Whether a run or a client of the older package holds the lease, rather than a recovery or nobody known."""
        return self.kind in ("held", "cancelled", "foreign")


def parse_live(raw: bytes) -> LeaseValue:
    """Parse a live key's value; never raises."""
    text = raw.decode("utf-8", "replace")
    if text == _FOREIGN:
        return LeaseValue("foreign")
    if text.startswith(_CLAIM_PREFIX):
        return LeaseValue("claimed")
    if _HOLDER.fullmatch(text):
        return LeaseValue("held", text)
    mark = _MARK.fullmatch(text)
    if mark is not None and _HOLDER.fullmatch(mark[1]):
        return LeaseValue("cancelled", mark[1], int(mark[2]))
    return LeaseValue("unreadable")


def new_holder(run_id: str, attempt: int) -> str:
    """Return the holder of an attempt, different each time: of two processes that try it, one holds the lease."""
    return f"{run_id}~{attempt}.{uuid.uuid4().hex[:12]}"


def gap_holder(run_id: str) -> str:
    """Return the holder of a run's mark while no process has the run."""
    return f"{run_id}~{_NOBODY}.gap"


def new_claim() -> str:
    """Return a recovery's value, different each time."""
    return f"{_CLAIM_PREFIX}{uuid.uuid4().hex}"


# The same codec in Lua: `holder_of()` and `run_of()`, for values as GET returns them.
LUA = f"""
local function is_holder(text)
  return text ~= '{_FOREIGN}' and #text <= 300 and string.find(text, '^[%w_.@=+|~-]+$') ~= nil
end
local function holder_of(value)
  if not value then return nil end
  if is_holder(value) then return value end
  local holder, ms = string.match(value, '^cancel:([^:]+):(%d+)$')
  if holder and #ms <= 15 and (holder == '{_FOREIGN}' or is_holder(holder)) then return holder end
  return nil
end
local function run_of(holder)
  local run, attempt = string.match(holder, '^(.+)~(%d+)%.%w+$')
  if run and #attempt <= 9 then return run end
  return holder
end
local function now_ms()
  local time = redis.call('TIME')
  return string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
end
"""

# Takes the lease, or keeps it where it is the caller's own, marked or not. ARGV: holder, TTL in ms.
# Replies {1, server ms} or {0, the value}.
ACQUIRE = Script(f"""{LUA}
local value = redis.call('GET', KEYS[1])
if not value then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif holder_of(value) == ARGV[1] then
  redis.call('GETEX', KEYS[1], 'PX', ARGV[2])
else
  return {{0, value}}
end
return {{1, now_ms()}}
""")

# Renews the caller's own lease, or its own claim, and replies the value, also another's. It neither brings a deleted
# lease back nor extends another's claim: a recovery that died must lose its claim. ARGV: holder or claim, TTL in ms.
RENEW = Script(f"""{LUA}
local value = redis.call('GET', KEYS[1])
if value and (value == ARGV[1] or holder_of(value) == ARGV[1]) then
  redis.call('GETEX', KEYS[1], 'PX', ARGV[2])
end
return value
""")

# Removes the caller's own lease, marked or not, or its own claim. ARGV: holder or claim.
RELEASE = Script(f"""{LUA}
local value = redis.call('GET', KEYS[1])
if value and (value == ARGV[1] or holder_of(value) == ARGV[1]) then return redis.call('DEL', KEYS[1]) end
return 0
""")

# Removes the caller's own lease, so that another process takes the run over; a cancel is kept for that one. ARGV:
# holder, gap holder, ms for which the cancel is kept. Replies 'another' where another process holds the session.
HAND_OVER = Script(f"""{LUA}
local value = redis.call('GET', KEYS[1])
if not value then return 0 end
local holder = holder_of(value)
if holder and holder ~= ARGV[1] and not string.find(holder, '~{_NOBODY}%.%w+$') then return 'another' end
if holder ~= ARGV[1] then return 0 end
if value == ARGV[1] then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], 'cancel:' .. ARGV[2] .. ':' .. string.match(value, ':(%d+)$'), 'PX', ARGV[3])
return 1
""")

# Takes the lease of a run whose process died; a cancel that came meanwhile is kept, also where the command is repeated
# after a lost reply. ARGV: holder, TTL in ms, run id. Replies {1, server ms} or {0, the value}.
TAKE_OVER = Script(f"""{LUA}
local value = redis.call('GET', KEYS[1])
local holder = holder_of(value)
if not value then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif holder == ARGV[1] then
  redis.call('GETEX', KEYS[1], 'PX', ARGV[2])
else
  local ms = string.match(value, ':(%d+)$')
  if not (holder and ms and run_of(holder) == ARGV[3] and string.find(holder, '~{_NOBODY}%.%w+$')) then
    return {{0, value}}
  end
  redis.call('SET', KEYS[1], 'cancel:' .. ARGV[1] .. ':' .. ms, 'PX', ARGV[2])
end
return {{1, now_ms()}}
""")

# Marks a run as cancelled while no process has it. ARGV: gap holder, TTL in ms.
MARK_GAP = Script(f"""{LUA}
return redis.call('SET', KEYS[1], 'cancel:' .. ARGV[1] .. ':' .. now_ms(), 'NX', 'PX', ARGV[2]) and 1 or 0
""")

# Claims a session that nobody holds. ARGV: claim, TTL in ms.
CLAIM = Script("return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0")

# Marks the lease of a live run and publishes the mark. The first mark wins: the measured latency is the first caller's.
# A client of the older package only looks whether the key is there. ARGV: channel, and the run if only one is meant.
# Replies 'marked', 'none' or 'claimed'.
MARK_CANCELLED = Script(f"""{LUA}
local value = redis.call('GET', KEYS[1])
if not value then return 'none' end
if string.sub(value, 1, {len(_CLAIM_PREFIX)}) == '{_CLAIM_PREFIX}' then return 'claimed' end
local holder = holder_of(value)
if ARGV[2] and value ~= ARGV[2] and not (holder and run_of(holder) == ARGV[2]) then return 'none' end
if value == '{_FOREIGN}' then
  redis.call('DEL', KEYS[1])
elseif not holder then
  return 'none'
elseif value == holder then
  value = 'cancel:' .. holder .. ':' .. now_ms()
  redis.call('SET', KEYS[1], value, 'KEEPTTL')
end
redis.call('PUBLISH', ARGV[1], value)
return 'marked'
""")
