"""The scripts that append to a session's stream (contract, section 4, append rule), and the wake-ups that they publish.

Each script touches one key. A wake-up is a message on the session's channel. The wake-up of `APPEND` has the number of
its entries, the id of the entry before them, and the id and the parts of each entry (`to_arguments()`), joined by line
breaks. A reader that has the entry before them need not read the stream. If the entries are many or large, the wake-up
is the last id alone. The wake-up of the other scripts always is.
"""

from __future__ import annotations

from ..redis.bus import Script
from ..redis.entry_id import StreamId, parse_id
from .entry import ARGUMENTS, LUA_FIELDS, RUNTIME, StreamEntry, to_lua_fields

_MOST_ENTRIES = 4
_MOST_BYTES = 4_096  # Redis buffers them for each process with listeners of the session

# In Lua: the wake-up for the entries whose arguments begin at ARGV[i]. `before` is the id of the entry before them.
_WAKE_UP = f"""
local function wake_up(before, i)
  local count = (#ARGV - i + 1) / {ARGUMENTS}
  if before and count <= {_MOST_ENTRIES} then
    local message = count .. '\\n' .. before .. '\\n' .. table.concat(ARGV, '\\n', i)
    if #message <= {_MOST_BYTES} then return message end
  end
  return ARGV[#ARGV - {ARGUMENTS - 1}]
end
"""

# Appends one batch: all of it, or nothing where an id is refused or our last entry is gone. A `begin`, `resume` or
# `end` after our last entry means that the stream is no longer ours; other entries after it come from `add()`. ARGV:
# id of our last entry (empty where lost entries are appended again), channel, maximal length, expiry in seconds; then
# for each entry its id and its parts. Replies the number of processes that received
# the wake-up, 'lost' or 'refused'.
APPEND = Script(f"""{LUA_FIELDS}{_WAKE_UP}
local key, before = KEYS[1], nil
if ARGV[1] ~= '' then
  local entries = redis.call('XRANGE', key, ARGV[1], '+')
  if not entries[1] or entries[1][1] ~= ARGV[1] then return 'lost' end
  for i = 2, #entries do
    local kind = entries[i][2][2]
    if kind == 'begin' or kind == 'resume' or kind == 'end' then return 'refused' end
  end
  before = entries[#entries][1]
else
  local top = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  before = top and top[1]
end
if before then
  local ms, n = string.match(before, '(%d+)-(%d+)')
  local our_ms, our_n = string.match(ARGV[5], '(%d+)-(%d+)')
  ms, n, our_ms, our_n = tonumber(ms), tonumber(n), tonumber(our_ms), tonumber(our_n)
  if our_ms < ms or (our_ms == ms and our_n <= n) then return 'refused' end
end
for i = 5, #ARGV, {ARGUMENTS} do
  redis.call('XADD', key, 'MAXLEN', '~', ARGV[3], ARGV[i], unpack(fields_at(i + 1)))
end
redis.call('EXPIRE', key, ARGV[4])
return redis.call('PUBLISH', ARGV[2], wake_up(before, 5))
""")

# Restarts a session's stream, unless its last entry has changed since it was read: one command that drops the run
# before, whose late entries are refused from then on. It does nothing where it arrives late: recovery may have looked
# at the run after its deadline, found no `begin`, and removed the deadline. ARGV: channel, expiry in seconds, id of the
# last entry as read (empty where there was none), the server's time in ms until which it may append, then the id and
# the parts of `begin`.
BEGIN = Script(f"""{LUA_FIELDS}
local time = redis.call('TIME')
if time[1] * 1000 + time[2] / 1000 > tonumber(ARGV[4]) then return 'late' end
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if (top and top[1] or '') ~= ARGV[3] then return 'refused' end
redis.call('XADD', KEYS[1], 'MAXLEN', '=', 1, ARGV[5], unpack(fields_at(6)))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[1], ARGV[5])
return 'ok'
""")

# Lets another process go on with the stream's run: appended only after the entry that it has read last. ARGV: channel,
# expiry in seconds, id of that entry, then the id and the parts of `resume`.
RESUME = Script(f"""{LUA_FIELDS}
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if top and top[1] == ARGV[4] and top[2][6] == ARGV[7] then return 'ok' end -- only the reply was lost
if not top or top[1] ~= ARGV[3] then return 'refused' end
redis.call('XADD', KEYS[1], ARGV[4], unpack(fields_at(5)))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[1], ARGV[4])
return 'ok'
""")

# The end of a run whose process is gone, unless the stream has changed since it was read: then the run lives, or has a
# successor. ARGV: last id as read, body of `error`, body of `end`, retention, channel.
FINALIZE = Script(f"""
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not top or top[1] ~= ARGV[1] then return 0 end
redis.call('XADD', KEYS[1], '*', {to_lua_fields("'error'", f"'{RUNTIME}'", "ARGV[2]")})
local id = redis.call('XADD', KEYS[1], '*', {to_lua_fields("'end'", f"'{RUNTIME}'", "ARGV[3]")})
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[5], id)
return 1
""")


def read_wake_up(message: bytes) -> tuple[StreamId, list[StreamEntry]] | None:
    """Return the id of the entry before the new ones, and these; None if the message has no entries.

    A line break in a name or a body changes the number of parts: then the entries are not used either.
    """
    fields = message.split(b"\n")
    count, rest = divmod(len(fields) - 2, ARGUMENTS)
    if count < 1 or rest or fields[0] != b"%d" % count:
        return None
    entries = [StreamEntry.of_arguments(fields[i : i + ARGUMENTS]) for i in range(2, len(fields), ARGUMENTS)]
    return parse_id(fields[1].decode()), entries
