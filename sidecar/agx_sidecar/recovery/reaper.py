"""The reaper: finishes runs whose process died. Every replica looks, one wins each run (contract, section 7)."""

from __future__ import annotations

import asyncio
import logging
import time

import orjson

from agx.facts.schema import (
    FIELD,
    MalformedFactError,
    RunFact,
    UnknownFactError,
    decode,
    encode,
)
from agx.redis import keys
from agx.redis.live_key import CLAIM, CLAIM_MS, RELEASE, new_claim, parse_live

from ..link import TROUBLE, Link
from ..meta import read_meta
from .finalize import LOST, Entry, write_obituary

logger = logging.getLogger(__name__)

SWEEP = 1.0  # seconds between two looks
_AT_ONCE = 100  # dead runs a look and partition
_CHUNK = 1_000  # entries a read
_QUEUE_LOOK = 20_000  # facts that are looked through for what a dead run had told
_BEFORE_BEGIN_MS = 5_000  # two nodes of a cluster may disagree so far on the time

# Ends the stream, unless its run has written since it was read. ARGV: its last id, error, end, retention, channel.
_END = """
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not top or top[1] ~= ARGV[1] then return 0 end
redis.call('XADD', KEYS[1], '*', 'type', 'error', 'origin', 'opale', 'body', ARGV[2])
local id = redis.call('XADD', KEYS[1], '*', 'type', 'end', 'origin', 'opale', 'body', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[5], id)
return 1
"""


class Reaper:
    """Looks for leases past their deadline and closes what their runs left open."""

    def __init__(self, link: Link, prefix: str) -> None:
        self._link = link
        self._prefix = prefix
        self._claim = new_claim()
        self._server: object = None
        self._steady_since = time.monotonic()

    async def run(self, partitions: int, stop: asyncio.Event) -> None:
        """Look every second until `stop`."""
        while not stop.is_set():
            try:
                if await self._is_steady():
                    for n in range(partitions):
                        await self._sweep(n)
            except TROUBLE as error:
                self._link.report_refusal("look for dead runs", error)
                self._steady_since = time.monotonic()
            try:
                await asyncio.wait_for(stop.wait(), SWEEP)
            except TimeoutError:
                continue

    async def _is_steady(self) -> bool:
        """Return whether the same server has answered for a lease's time: after an outage all leases look expired."""
        info = await self._link.call("INFO", "server")
        server = info.get("run_id") if isinstance(info, dict) else None
        if server != self._server or self._link.steady_since > self._steady_since:
            self._server = server
            self._steady_since = max(self._steady_since, self._link.steady_since, time.monotonic())
        meta = await read_meta(self._link, self._prefix)
        return meta is not None and time.monotonic() - self._steady_since > meta.lease_ttl

    async def _sweep(self, n: int) -> None:
        seconds, micros = await self._link.call("TIME")
        now_ms = int(seconds) * 1_000 + int(micros) // 1_000
        leases = keys.leases(self._prefix, n)
        for member in await self._link.call("ZRANGEBYSCORE", leases, "-inf", now_ms, "LIMIT", 0, _AT_ONCE):
            try:
                session, run_id = keys.parse_lease_member(self._prefix, member.decode())
            except ValueError:
                await self._link.call("ZREM", leases, member)
                continue
            await self._bury(n, session, run_id)

    async def _bury(self, n: int, session: keys.SessionKeys, run_id: str) -> None:
        held = await self._link.call("GET", session.live)
        if held is not None:
            value = parse_live(held)
            if value.run_id == run_id or not value.is_anothers:
                return  # alive, its deadline is only a hint; or another replica is at it; or nobody knows
            # The session has a new run: the old one can only be told to operators.
            await self._tell(n, session, run_id, restarted=True)
            await self._forget(n, session, run_id, indexed=True)
            return
        if not await self._link.call("EVAL", CLAIM.source, 1, session.live, self._claim, CLAIM_MS):
            return
        try:
            if not await self._tell(n, session, run_id, restarted=False):
                return  # it has written meanwhile: it lives
            await self._forget(n, session, run_id, indexed=False)
        finally:
            await self._link.call("EVAL", RELEASE.source, 1, session.live, self._claim)

    async def _forget(self, n: int, session: keys.SessionKeys, run_id: str, *, indexed: bool) -> None:
        await self._link.call("ZREM", keys.leases(self._prefix, n), session.lease_member(run_id))
        if not indexed:
            await self._link.call("ZREM", session.index, session.session)

    async def _tell(self, n: int, session: keys.SessionKeys, run_id: str, *, restarted: bool) -> bool:
        """End a dead run's stream and queue the facts it owes; returns False if it turns out to live."""
        entries = [] if restarted else await self._read_stream(session)
        if entries and entries[0].body.get("run_id", run_id) != run_id:
            entries = []  # it died before its `begin`, or was restarted
        begin_ms = entries[0].ns // 1_000_000 if entries else None
        told = await self._read_told(n, run_id, begin_ms)
        obituary = write_obituary(session, run_id, entries, told)
        if obituary.error is not None:
            ended = await self._link.call(
                "EVAL",
                _END,
                1,
                session.stream,
                entries[-1].id,
                orjson.dumps(obituary.error),
                orjson.dumps(obituary.end),
                max(1, int(obituary.retention)),
                session.wake_channel,
            )
            if not ended:
                return False
        for fact in obituary.facts:
            await self._link.call("XADD", keys.queue(self._prefix, n), "*", FIELD, encode(fact))
        if obituary.facts:
            await self._link.call("EXPIRE", keys.queue(self._prefix, n), keys.QUEUE_TTL)
            outcome = getattr(obituary.facts[-1], "outcome", LOST)
            # Ids of a session are for operators' logs, never for metrics.
            logger.warning("run %s died and was finished as %s", run_id, outcome, extra={"run_id": run_id})
        return True

    async def _read_stream(self, session: keys.SessionKeys) -> list[Entry]:
        entries: list[Entry] = []
        cursor = "-"
        while True:
            found = await self._link.call("XRANGE", session.stream, cursor, "+", "COUNT", _CHUNK)
            for entry_id, fields in found:
                values = dict(zip(fields[::2], fields[1::2], strict=False))
                raw = values.get(b"body", b"{}")
                try:
                    body = orjson.loads(raw)
                except orjson.JSONDecodeError:
                    body = {}
                body = body if isinstance(body, dict) else {}
                entries.append(Entry(entry_id.decode(), values.get(b"type", b"").decode(), body, len(raw)))
            if len(found) < _CHUNK:
                return entries
            cursor = f"({entries[-1].id}"

    async def _read_told(self, n: int, run_id: str, begin_ms: int | None) -> list[RunFact]:
        """Return the facts of the run and of its sub-agents that are still queued; they follow its `begin`."""
        told: list[RunFact] = []
        cursor = "-" if begin_ms is None else str(max(0, begin_ms - _BEFORE_BEGIN_MS))
        looked = 0
        needle = run_id.encode()
        while looked < _QUEUE_LOOK:
            found = await self._link.call("XRANGE", keys.queue(self._prefix, n), cursor, "+", "COUNT", _CHUNK)
            for _, fields in found:
                if needle not in fields[1]:
                    continue
                try:
                    fact = decode(fields[1])
                except (UnknownFactError, MalformedFactError):
                    continue
                if isinstance(fact, RunFact):
                    told.append(fact)
            looked += len(found)
            if len(found) < _CHUNK:
                break
            cursor = f"({found[-1][0].decode()}"
        return told
