"""The scripts that append to a session's stream (contract, section 4, append rule); each touches one key."""

from __future__ import annotations

from ..redis.bus import Script
from .entry import RUNTIME, to_lua_fields

# Appends one batch: all of it, or nothing where an id is refused or our last entry is gone. A `begin` or an `end`
# behind our last entry means that our run is over; other entries behind it come from `add()`. ARGV: id of our last
# entry (empty where lost entries are appended again), channel, maximal length, expiry in seconds; then five arguments
# an entry: id, type, origin, body, its own field `seq` ('-' for none).
APPEND = Script(f"""
local key = KEYS[1]
if ARGV[1] ~= '' then
  local entries = redis.call('XRANGE', key, ARGV[1], '+')
  if not entries[1] or entries[1][1] ~= ARGV[1] then return 'lost' end
  for i = 2, #entries do
    local kind = entries[i][2][2]
    if kind == 'begin' or kind == 'end' then return 'refused' end
  end
end
local top = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
if top then
  local ms, n = string.match(top[1], '(%d+)-(%d+)')
  local our_ms, our_n = string.match(ARGV[5], '(%d+)-(%d+)')
  ms, n, our_ms, our_n = tonumber(ms), tonumber(n), tonumber(our_ms), tonumber(our_n)
  if our_ms < ms or (our_ms == ms and our_n <= n) then return 'refused' end
end
for i = 5, #ARGV, 5 do
  if ARGV[i+4] == '-' then
    redis.call('XADD', key, 'MAXLEN', '~', ARGV[3], ARGV[i], {to_lua_fields("ARGV[i+1]", "ARGV[i+2]", "ARGV[i+3]")})
  else
    redis.call('XADD', key, 'MAXLEN', '~', ARGV[3], ARGV[i],
      {to_lua_fields("ARGV[i+1]", "ARGV[i+2]", "ARGV[i+3]", "ARGV[i+4]")})
  end
end
redis.call('EXPIRE', key, ARGV[4])
redis.call('PUBLISH', ARGV[2], ARGV[#ARGV - 4])
return 'ok'
""")

# Restarts a session's stream: one command that drops the run before, whose late entries are refused from then on.
BEGIN = Script(f"""
redis.call('XADD', KEYS[1], 'MAXLEN', '=', 1, ARGV[1], {to_lua_fields("'begin'", "ARGV[2]", "ARGV[3]")})
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[5], ARGV[1])
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
