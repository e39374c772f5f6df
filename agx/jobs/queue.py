"""The jobs queue: one stream per partition, one entry per job, claimed by one worker (contract, section 4).

An entry stays until its run has begun. A worker looks at the waiting entries and picks fairly among scopes, so it
claims an entry by its id instead of taking the next one. A claim that is not renewed passes to another worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from redis.exceptions import ResponseError

from ..checkpoints.job import Job, UnreadableJobError, decode
from ..redis import keys
from ..redis.bus import Bus, Script

_GROUP = "agx-workers"
WINDOW = 2_000  # waiting jobs of a partition among which a worker picks

# ARGV: scope, most waiting jobs of a scope, TTL, wake-up channel, due time (ms after now), agent, job.
_SUBMIT = Script("""
local waiting = redis.call('XLEN', KEYS[1])
if waiting >= tonumber(ARGV[2]) then
  local ours = 0
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
    if entry[2][2] == ARGV[1] then ours = ours + 1 end
  end
  if ours >= tonumber(ARGV[2]) then return 0 end
end
local t = redis.call('TIME')
local due = t[1] * 1000 + math.floor(t[2] / 1000) + tonumber(ARGV[5])
redis.call('XADD', KEYS[1], '*', 'scope', ARGV[1], 'due', string.format('%.0f', due), 'agent', ARGV[6], 'job', ARGV[7])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[4], '1')
return 1
""")

# ARGV: group, worker, entry id, ms for which a claim of another worker holds. Replies how many workers have claimed the
# entry by now and not given it back; 0 where it is not ours.
_CLAIM = Script("""
if #redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3]) == 0 then return 0 end
local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
local claims = 1
if held then
  if held[2] == ARGV[2] then
    claims = held[4]
  elseif held[3] < tonumber(ARGV[4]) then
    return 0
  else
    claims = held[4] + 1
  end
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'RETRYCOUNT', claims, 'FORCE', 'JUSTID')
return claims
""")

# ARGV: group, worker, entry id. Removes an entry only while the claim is ours.
_REMOVE = Script("""
local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if held and held[2] ~= ARGV[2] then return 0 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return redis.call('XDEL', KEYS[1], ARGV[3])
""")

# Lets the claim expire at once; it does not count. ARGV: group, worker, entry id, ms for which a claim holds.
_GIVE_BACK = Script("""
local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if held and held[2] == ARGV[2] then
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'RETRYCOUNT', held[4] - 1, 'JUSTID')
end
return 1
""")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits, as far as a worker needs to know to pick one. Times: ms of the server's clock."""

    partition: int
    entry_id: str
    scope: str
    agent: str
    due_ms: int
    data: bytes

    def read(self) -> Job | None:
        """Return the job; None where this version can't read it."""
        try:
            return decode(self.data)
        except UnreadableJobError:
            return None


class JobQueue:
    """The jobs queue of one prefix.

    Args:
        worker: this worker's name among those that claim; unique.
        claim_ttl: seconds for which a claim holds without being renewed.
    """

    def __init__(self, bus: Bus, prefix: str, partitions: int, *, worker: str, claim_ttl: float) -> None:
        self._bus = bus
        self._prefix = prefix
        self._partitions = partitions
        self._worker = worker
        self._claim_ms = int(claim_ttl * 1_000)

    async def submit(self, job: Job, *, delay: float, max_waiting: int) -> bool:
        """Append a job, due in `delay` seconds; returns False where its scope has `max_waiting` jobs already.

        Raises:
            RedisError, OSError: it is not known whether the job was appended.
        """
        key = keys.jobs(self._prefix, keys.partition(job.scope_id, self._partitions))
        args = (job.scope_id, max_waiting, keys.JOBS_TTL, keys.jobs_wake_channel(self._prefix), int(delay * 1_000))
        return bool(await self._bus.run(_SUBMIT, key, *args, job.agent, job.encode()))

    async def waiting(self, partition: int) -> list[Waiting]:
        """Return the oldest jobs of a partition, also those that are not due or claimed by others."""
        key = keys.jobs(self._prefix, partition)
        found = []
        for entry_id, fields in await self._bus.execute("XRANGE", key, "-", "+", "COUNT", WINDOW):
            due = fields.get(b"due", b"")
            found.append(
                Waiting(
                    partition=partition,
                    entry_id=entry_id.decode(),
                    scope=fields.get(b"scope", b"").decode("utf-8", "replace"),
                    agent=fields.get(b"agent", b"").decode("utf-8", "replace"),
                    due_ms=int(due) if due.isascii() and due.isdigit() else 0,
                    data=fields.get(b"job", b""),
                )
            )
        return found

    async def claim(self, waiting: Waiting) -> int:
        """Claim a job, or renew the claim; returns 0 where another worker holds it or it is gone.

        Otherwise it returns how many workers have claimed the job, this one included: all others stopped with it.
        """
        args = (_GROUP, self._worker, waiting.entry_id, self._claim_ms)
        key = keys.jobs(self._prefix, waiting.partition)
        claims = await self._with_group(key, _CLAIM, args)
        return claims if isinstance(claims, int) else 0

    async def remove(self, waiting: Waiting) -> None:
        """Remove a job whose run has begun, or that can't be run."""
        args = (_GROUP, self._worker, waiting.entry_id)
        await self._with_group(keys.jobs(self._prefix, waiting.partition), _REMOVE, args)

    async def give_back(self, waiting: Waiting) -> None:
        """Let other workers claim a job at once; this claim does not count."""
        args = (_GROUP, self._worker, waiting.entry_id, self._claim_ms)
        await self._with_group(keys.jobs(self._prefix, waiting.partition), _GIVE_BACK, args)

    async def _with_group(self, key: str, script: Script, args: tuple[str | int, ...]) -> object:
        try:
            return await self._bus.run(script, key, *args)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        try:
            await self._bus.execute("XGROUP", "CREATE", key, _GROUP, "0", "MKSTREAM")
            await self._bus.execute("EXPIRE", key, keys.JOBS_TTL)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        return await self._bus.run(script, key, *args)
