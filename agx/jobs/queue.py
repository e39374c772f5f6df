"""The jobs queue: one stream per partition, one entry per job, claimed by one worker (contract, section 4).

An entry stays until its run has begun. A worker looks at the waiting entries and picks fairly among scopes, so it
claims an entry by its id instead of taking the next one. A claim that is not renewed passes to another worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from redis.exceptions import ResponseError

from ..checkpoints.job import Job, UnreadableJobError, decode
from ..redis import keys
from ..redis.bus import Bus, Script
from ..redis.entry_id import parse_id

_GROUP = "agx-workers"
WINDOW = 2_000  # waiting jobs of a partition among which a worker picks
_PAGE = 100  # jobs that the server holds in memory at a time while it lists or counts them

# ARGV: scope, most waiting jobs of a scope, TTL, wake-up channel, due time (ms after now), agent, job, entries a read,
# session, most waiting jobs of a session or 0 for any number. Replies what is full.
_SUBMIT = Script("""
local most, most_queued = tonumber(ARGV[2]), tonumber(ARGV[10])
local ours, queued, from = 0, 0, '-'
while most_queued > 0 or redis.call('XLEN', KEYS[1]) >= most do
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[8])
  if #page == 0 then break end
  for _, entry in ipairs(page) do
    if entry[2][2] == ARGV[1] then
      ours = ours + 1
      if entry[2][10] == ARGV[9] then queued = queued + 1 end
    end
  end
  if ours >= most then return 'scope' end
  if most_queued > 0 and queued >= most_queued then return 'session' end
  from = '(' .. page[#page][1]
end
local t = redis.call('TIME')
local due = t[1] * 1000 + math.floor(t[2] / 1000) + tonumber(ARGV[5])
redis.call('XADD', KEYS[1], '*', 'scope', ARGV[1], 'due', string.format('%.0f', due), 'agent', ARGV[6], 'job', ARGV[7],
  'session', ARGV[9])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[4], '1')
return ''
""")

# Lists entries without their jobs, or nothing where the stream is as it was. ARGV: most entries, entries a read,
# version as of the last listing, first id. Replies the version; then id, scope, due time, agent and session of each.
_LIST = Script("""
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local version = redis.call('XLEN', KEYS[1]) .. ' ' .. (top and top[1] or '')
if version == ARGV[3] then return {version} end
local found, from, left = {version}, ARGV[4], tonumber(ARGV[1])
while left > 0 do
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', math.min(left, tonumber(ARGV[2])))
  if #page == 0 then break end
  for _, entry in ipairs(page) do
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    found[#found + 1] = entry[1]
    for _, name in ipairs({'scope', 'due', 'agent', 'session'}) do found[#found + 1] = fields[name] or '' end
  end
  from = '(' .. page[#page][1]
  left = left - #page
end
return found
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

# Removes the jobs of a session, also claimed ones. ARGV: group, scope, session, entries a read. Replies how many.
_REMOVE_SESSION = Script("""
local removed, from = 0, '-'
while true do
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[4])
  if #page == 0 then return removed end
  for _, entry in ipairs(page) do
    if entry[2][2] == ARGV[2] and entry[2][10] == ARGV[3] then
      redis.call('XACK', KEYS[1], ARGV[1], entry[1])
      removed = removed + redis.call('XDEL', KEYS[1], entry[1])
    end
  end
  from = '(' .. page[#page][1]
end
""")

# Lets the claim expire at once; it does not count. The entry leaves the worker, which may claim it anew like any other.
# ARGV: group, worker, entry id, ms for which a claim holds.
_GIVE_BACK = Script("""
local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if held and held[2] == ARGV[2] then
  redis.call('XCLAIM', KEYS[1], ARGV[1], 'nobody', 0, ARGV[3], 'IDLE', ARGV[4], 'RETRYCOUNT', held[4] - 1, 'JUSTID')
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
    session: str  # user and session; empty for a job of an earlier version


@dataclass(frozen=True, slots=True)
class _Listing:
    """The last listing of a partition, which is one page where there are more jobs than WINDOW.

    Args:
        version: of the stream, if it was listed whole.
        next: the first id of the next listing.
        earlier: by scope and session: when the first of its jobs in this page and in those before is due.
    """

    version: bytes = b""
    jobs: list[Waiting] = field(default_factory=list)
    next: str = "-"
    earlier: dict[tuple[str, str], int] = field(default_factory=dict)


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
        self._listed: dict[int, _Listing] = {}  # by partition

    async def submit(
        self, job: Job, data: bytes, *, delay: float, max_waiting: int, max_queued: int | None = None
    ) -> str:
        """Append a job, due in `delay` seconds, unless something is full: returns `scope`, `session`, or nothing.

        Args:
            data: the job, encoded.
            max_waiting: jobs of its scope.
            max_queued: jobs of its session; None sets no limit.

        Raises:
            RedisError, OSError: it is not known whether the job was appended.
        """
        key = keys.jobs(self._prefix, keys.partition(job.scope_id, self._partitions))
        args = (job.scope_id, max_waiting, keys.JOBS_TTL, keys.jobs_wake_channel(self._prefix), int(delay * 1_000))
        session = _session(job.user_id, job.session_id)
        full = await self._bus.run(_SUBMIT, key, *args, job.agent, data, _PAGE, session, max_queued or 0)
        return bytes(full).decode()

    async def waiting(self, partition: int) -> list[Waiting]:
        """Return jobs of a partition, also those that are not due or claimed by others; the oldest ones first.

        Of more jobs than WINDOW each call returns the next ones, so that the jobs of one scope hide no other's. Those
        that have to begin after one of their session that an earlier call has returned are left out.
        Nothing is transferred where no job came or went since the last call, and never a job itself.
        """
        before = self._listed.get(partition, _Listing())
        key = keys.jobs(self._prefix, partition)
        version, *values = await self._bus.run(_LIST, key, WINDOW, _PAGE, before.version, before.next)
        if version == before.version:
            return before.jobs
        if not values and before.next != "-":
            del self._listed[partition]
            return await self.waiting(partition)
        found = [
            Waiting(
                partition=partition,
                entry_id=entry_id.decode(),
                scope=scope.decode("utf-8", "replace"),
                agent=agent.decode("utf-8", "replace"),
                due_ms=int(due) if due.isascii() and due.isdigit() else 0,
                session=session.decode("utf-8", "replace"),
            )
            for entry_id, scope, due, agent, session in zip(*[iter(values)] * 5, strict=True)
        ]
        if len(found) < WINDOW:
            self._listed[partition] = _Listing(version if before.next == "-" else b"", _in_order(found, before.earlier))
        else:
            earlier = dict(before.earlier)
            for job in found:
                earlier[job.scope, job.session] = min(job.due_ms, earlier.get((job.scope, job.session), job.due_ms))
            more = f"({found[-1].entry_id}"
            self._listed[partition] = _Listing(b"", _in_order(found, before.earlier), more, earlier)
        return self._listed[partition].jobs

    async def read(self, waiting: Waiting) -> Job | None:
        """Return a job; None where this version can't read it, or it has left the queue."""
        key, entry_id = keys.jobs(self._prefix, waiting.partition), waiting.entry_id
        found = await self._bus.execute("XRANGE", key, entry_id, entry_id)
        try:
            if not found:
                return None
            return replace(decode(found[0][1].get(b"job", b"")), submitted_ms=parse_id(entry_id)[0])
        except UnreadableJobError:
            return None

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

    async def remove_session(self, scope: str, user: str, session: str) -> int:
        """Remove the jobs of a session, claimed ones too; returns how many."""
        key = keys.jobs(self._prefix, keys.partition(scope, self._partitions))
        return int(await self._bus.run(_REMOVE_SESSION, key, _GROUP, scope, _session(user, session), _PAGE))

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


def _session(user: str, session: str) -> str:
    return f"{user}:{session}"


def _in_order(jobs: list[Waiting], earlier: Mapping[tuple[str, str], int]) -> list[Waiting]:
    """Return the jobs but for those before which another one of their session is due; `earlier` has those."""
    return [job for job in jobs if not job.session or earlier.get((job.scope, job.session), math.inf) > job.due_ms]
