"""The checks of `agx doctor`: each looks at one thing and returns what it found and what to do."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from redis.asyncio import RedisCluster
from redis.exceptions import NoPermissionError, ResponseError

from ..fleet.fleet import find_dead, find_live, read_clock, read_partitions
from ..redis import keys
from ..redis.entry_id import parse_id
from ..redis.meta import parse_meta
from .options import Connection
from .rights import find_rights
from .terminal import format_duration

State = Literal["ok", "warning", "fault"]

_OLDEST = (7, 0)  # Redis and Valkey count alike up to 7.2
_SKEW_MS = 1_000
_FULL = 0.9  # of maxmemory
_LATE_MS = 30_000  # a fact that waits longer is reported
_UNREAD_MS = 120_000  # idle time of all its consumers after which a group counts as unread
_GRACE_MS = 5_000  # in which a reaper closes a dead run
_UNSERVED_MS = 30_000  # since a worker last announced an agent; then none serves it
_BEYOND = 64  # partitions looked at above those in force


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    message: str
    to_do: str = ""


Check = Callable[[Connection], Awaitable[list[Finding]]]


async def check_everything(connection: Connection) -> list[Finding]:
    """Run all checks, one after the other; what the user may not read is reported.

    Raises:
        RedisError, OSError: the server does not answer.
    """
    findings: list[Finding] = []
    for name, check in _CHECKS.items():
        try:
            findings += await check(connection)
        except NoPermissionError as error:
            findings.append(Finding(name, "warning", f"not looked at: {error}", "ask as a user who may"))
    return findings


async def _info(connection: Connection, section: str) -> list[dict[str, Any]]:
    """Return a section of INFO from each primary."""
    if not isinstance(connection.client, RedisCluster):
        return [await connection.client.info(section)]
    by_node = await connection.client.info(section, target_nodes=RedisCluster.PRIMARIES)
    return list(by_node.values()) if "redis_version" not in by_node else [by_node]


async def _check_version(connection: Connection) -> list[Finding]:
    found = []
    for info in await _info(connection, "server"):
        name = "Valkey" if "valkey_version" in info else "Redis"
        text = str(info.get("valkey_version") or info.get("redis_version"))
        version = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
        found.append((version >= _OLDEST, f"{name} {text}"))
    message = ", ".join(sorted({what for _, what in found}))
    if all(good for good, _ in found):
        return [Finding("server", "ok", f"{message} at {connection.name}")]
    return [
        Finding(
            "server", "fault", f"{message} at {connection.name}", "agx needs Redis 7.0 or Valkey: update the server"
        )
    ]


async def _check_memory(connection: Connection) -> list[Finding]:
    infos = await _info(connection, "memory")
    findings = []
    if bad := {str(info["maxmemory_policy"]) for info in infos} - {"noeviction"}:
        findings.append(
            Finding(
                "memory",
                "fault",
                f"maxmemory-policy is {', '.join(sorted(bad))}: the server may evict leases and queues",
                "set maxmemory-policy noeviction in its configuration, now with CONFIG SET, or use another server",
            )
        )
    shares = [int(info["used_memory"]) / int(info["maxmemory"]) for info in infos if int(info.get("maxmemory", 0))]
    if shares and max(shares) > _FULL:
        findings.append(
            Finding("memory", "warning", f"{max(shares):.0%} of maxmemory is in use", "raise it before appends fail")
        )
    return findings or [Finding("memory", "ok", "nothing is evicted")]


async def _check_rights(connection: Connection) -> list[Finding]:
    rights = await find_rights(connection.client, connection.prefix)
    roles = rights.suffices_for
    lacking = "; ".join(
        f"as a {role} it lacks {', '.join(dict.fromkeys(lacks))}" for role, lacks in rights.missing.items() if lacks
    )
    if not roles:
        to_do = "give it the rules of docs/how-to/redis.md"
        return [Finding("rights", "fault", f"this user is none that agx can use: {lacking}", to_do)]
    message = f"this user will do for a {', a '.join(roles)}"
    return [Finding("rights", "ok", f"{message}; {lacking}" if lacking else message)]


async def _check_clock(connection: Connection) -> list[Finding]:
    before = time.time()
    server_ms = await read_clock(connection.bus)
    after = time.time()
    # A difference within the round trip is not a skew.
    skew = max(server_ms - after * 1_000, before * 1_000 - server_ms, 0.0)
    message = f"{skew:.0f} ms apart, a round trip takes {(after - before) * 1_000:.1f} ms"
    if skew > _SKEW_MS:
        to_do = "synchronise the clocks of this machine and of the server (NTP): latencies of cancels would be wrong"
        return [Finding("clock", "warning", message, to_do)]
    return [Finding("clock", "ok", message)]


async def _check_partitions(connection: Connection) -> list[Finding]:
    # Field by field: a service's rights do not include HGETALL.
    key, names = keys.meta(connection.prefix), ("partitions", "format")
    values = {name: await connection.bus.execute("HGET", key, name) for name in names}
    meta = parse_meta({name: value for name, value in values.items() if value is not None})
    if meta is None:
        message = f"no service has run on prefix {connection.prefix!r} in the last day"
        return [Finding("partitions", "warning", message, "check --prefix, or start a run")]
    if meta.is_newer:
        return [
            Finding("partitions", "warning", f"their format is {meta.format}", "a newer agx runs here: update this")
        ]
    partitions = meta.partitions
    beyond = [keys.queue(connection.prefix, n) for n in range(partitions, partitions + _BEYOND)]
    if left := [key for key in beyond if await connection.bus.execute("XRANGE", key, "-", "+", "COUNT", 1)]:
        to_do = "written under another number of partitions: sidecars pass them over, and they expire in a day"
        return [Finding("partitions", "warning", f"{partitions}, and {', '.join(left)} beside them", to_do)]
    return [Finding("partitions", "ok", f"{partitions}")]


async def _check_leases(connection: Connection) -> list[Finding]:
    partitions = await read_partitions(connection.bus, connection.prefix)
    if partitions is None:
        return []
    now_ms = await read_clock(connection.bus)
    runs = await find_live(connection.bus, connection.prefix, partitions)
    dead, recovering = await find_dead(connection.bus, runs, now_ms - _GRACE_MS)
    if not dead:
        live = f"{len(runs) - len(recovering)} live"
        return [Finding("leases", "ok", f"{live}, {len(recovering)} recovering" if recovering else live)]
    message = (
        f"{len(dead)} of {len(runs)} have no process any more and nobody has closed them, "
        f"such as {dead[0].session.path}"
    )
    return [
        Finding("leases", "fault", message, "start agx-sidecar on this prefix: it ends what a dead process left open")
    ]


async def _check_leader(connection: Connection) -> list[Finding]:
    if await connection.client.get(keys.leader(connection.prefix)) is not None:
        return [Finding("leader", "ok", "a sidecar counts the metrics")]
    to_do = "start agx-sidecar with the metrics sink (AGX_SINKS); facts are kept for a while and counted then"
    return [Finding("leader", "warning", "no sidecar counts the metrics", to_do)]


async def _check_jobs(connection: Connection) -> list[Finding]:
    partitions = await read_partitions(connection.bus, connection.prefix)
    if partitions is None:
        return []
    from ..jobs.queue import JobQueue  # noqa: PLC0415 - pydantic-ai's import takes a second

    queue = JobQueue(connection.bus, connection.prefix, partitions, worker="-", claim_ttl=0)
    now_ms = await read_clock(connection.bus)
    jobs = [job for n in range(partitions) for job in await queue.waiting(n) if job.due_ms <= now_ms]
    not_served = []
    for agent in sorted({job.agent for job in jobs}):
        seen = await connection.bus.execute("ZSCORE", keys.workers(connection.prefix), agent)
        if seen is None or now_ms - float(seen) > _UNSERVED_MS:
            not_served.append(agent)
    if not_served:
        message = f"jobs wait for {', '.join(not_served)}, and no worker serves that name"
        return [
            Finding("jobs", "fault", message, "start a worker with a recipe of that name, or correct it in submit()")
        ]
    return [Finding("jobs", "ok", f"{len(jobs)} waiting")]


async def _check_queues(connection: Connection) -> list[Finding]:
    partitions = await read_partitions(connection.bus, connection.prefix)
    if partitions is None:
        return []
    now_ms = await read_clock(connection.bus)
    length, findings = 0, []
    for n in range(partitions):
        key = keys.queue(connection.prefix, n)
        try:
            groups = await connection.client.xinfo_groups(key)
            length += int(await connection.client.xlen(key))
        except ResponseError as error:
            if isinstance(error, NoPermissionError):
                raise
            continue  # no such key: nothing has been queued
        for group in groups:
            findings += await _check_group(connection, key, group, now_ms)
    return findings or [Finding("queues", "ok", f"{length:,} facts, no reader is behind")]


async def _check_group(connection: Connection, key: str, group: dict[str, Any], now_ms: int) -> list[Finding]:
    name, delivered = _text(group["name"]), _text(group["last-delivered-id"])
    after = await connection.bus.execute("XRANGE", key, f"({delivered}", "+", "COUNT", 1)
    waits_ms = now_ms - parse_id(_text(after[0][0]))[0] if after else 0
    consumers = await connection.client.xinfo_consumers(key, group["name"])
    away_ms = min((int(consumer["idle"]) for consumer in consumers), default=None)
    if (away_ms is None or away_ms > _UNREAD_MS) and (after or group["pending"]):
        since = f"for {format_duration(away_ms)}" if away_ms is not None else "at all"
        waits = f"{group['pending']} facts are pending, the oldest unread one waits {format_duration(waits_ms)}"
        message = f"nobody reads group {name} of {key} {since}: {waits}"
        to_do = f"start agx-sidecar with that sink; if it is gone for good: XGROUP DESTROY {key} {name}"
        return [Finding("queues", "fault", message, to_do)]
    if waits_ms > _LATE_MS:
        to_do = "look at the sidecar's log: the collector may be down, or too slow for one replica"
        return [Finding("queues", "warning", f"group {name} of {key} is {format_duration(waits_ms)} behind", to_do)]
    return []


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


_CHECKS: dict[str, Check] = {
    "server": _check_version,
    "memory": _check_memory,
    "rights": _check_rights,
    "clock": _check_clock,
    "partitions": _check_partitions,
    "leases": _check_leases,
    "leader": _check_leader,
    "queues": _check_queues,
    "jobs": _check_jobs,
}
