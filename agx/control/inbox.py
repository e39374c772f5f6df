"""The inbox of a session: the messages steered into its run, until a conversation has them (contract, section 4).

The entries of the stream, by their field `kind`:

| kind | meaning |
|---|---|
| `steer` | a message that waits, with its key and the run that was live when it came |
| `taken` | a message that a conversation has by now; only its key is kept, so that a repeat is recognized |
| `closed` | this run takes no more messages: it has asked its model for the last time |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..redis.bus import Bus, Script
from ..redis.keys import INBOX_TTL, SessionKeys

MAX_WAITING = 50  # messages of a session
MAX_TEXT = 32_768  # bytes of a message
STEER_HINT = b"steer"  # on the session's cancel channel
START = "0-0"  # an id below all
_MAX_KEYS = 100  # of messages that were taken
OWN_KEY = ":"  # begins the key of a message whose sender gave none

# Finds the fields by their places, as `_PUT` and `_CLOSE` write them: kind, key, run, text.
_LUA = """
local function entries() return redis.call('XRANGE', KEYS[1], '-', '+') end
local function parse(entry) return entry[2][2], entry[2][4], entry[2][6] end
local function add(kind, key, run, text)
  redis.call('XADD', KEYS[1], '*', 'kind', kind, 'key', key, 'run', run, 'text', text)
end
"""

# ARGV: key, run, text, most waiting messages, TTL, channel, hint.
_PUT = Script(f"""{_LUA}
local waiting, is_closed = 0, false
for _, entry in ipairs(entries()) do
  local kind, key, run = parse(entry)
  if kind ~= 'closed' and key == ARGV[1] then return 'put' end
  is_closed = is_closed or (kind == 'closed' and run == ARGV[2])
  if kind == 'steer' then waiting = waiting + 1 end
end
if is_closed then return 'closed' end
if waiting >= tonumber(ARGV[4]) then return 'full' end
add('steer', ARGV[1], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('PUBLISH', ARGV[6], ARGV[7])
return 'put'
""")

# Closes the inbox for a run, unless there is a message it has not read. ARGV: run, id of the last one read, TTL.
_CLOSE = Script(f"""{_LUA}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[2], '+')) do
  if parse(entry) == 'steer' then return 0 end
end
for _, entry in ipairs(entries()) do
  if parse(entry) == 'closed' then redis.call('XDEL', KEYS[1], entry[1]) end
end
add('closed', '', ARGV[1], '')
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
""")

# Removes messages, and keeps the keys that their senders gave. ARGV: most keys, then ids.
_REMOVE = Script(f"""{_LUA}
for n = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[n], ARGV[n])[1]
  if entry then
    local _, key, run = parse(entry)
    redis.call('XDEL', KEYS[1], ARGV[n])
    if string.sub(key, 1, 1) ~= '{OWN_KEY}' then add('taken', key, run, '') end
  end
end
local taken = {{}}
for _, entry in ipairs(entries()) do
  if parse(entry) == 'taken' then taken[#taken + 1] = entry[1] end
end
for n = 1, #taken - tonumber(ARGV[1]) do redis.call('XDEL', KEYS[1], taken[n]) end
return 1
""")


@dataclass(frozen=True, slots=True)
class SteeredText:
    """A message that waits in an inbox."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Inbox:
    """The inbox of one session. Each method raises RedisError or OSError where Redis did not answer."""

    bus: Bus
    session: SessionKeys

    async def put(self, run_id: str, key: str, text: str) -> Literal["put", "closed", "full"]:
        """Add a message for the run that is live; one whose key the inbox knows is not added again."""
        args = (key, run_id, text, MAX_WAITING, INBOX_TTL, self.session.cancel_channel, STEER_HINT)
        reply = await self.bus.run(_PUT, self.session.inbox, *args)
        return {b"closed": "closed", b"full": "full"}.get(reply, "put")  # type: ignore[return-value]

    async def read(self, after: str) -> list[SteeredText]:
        """Return the messages after an id, in their order."""
        found = await self.bus.execute("XRANGE", self.session.inbox, f"({after}", "+")
        return [
            SteeredText(entry_id.decode(), fields[b"text"].decode("utf-8", "replace"))
            for entry_id, fields in found
            if fields.get(b"kind") == b"steer"
        ]

    async def close(self, run_id: str, after: str) -> bool:
        """Refuse further messages for a run; returns False where there is one after `after`."""
        return bool(await self.bus.run(_CLOSE, self.session.inbox, run_id, after, INBOX_TTL))

    async def remove(self, ids: Iterable[str]) -> None:
        """Remove messages that a stored conversation has."""
        await self.bus.run(_REMOVE, self.session.inbox, _MAX_KEYS, *ids)
