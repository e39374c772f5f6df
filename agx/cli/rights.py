"""The rights of the Redis user: tries every command that a role needs, with arguments that change nothing."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from redis.exceptions import NoPermissionError, ResponseError

from ..redis import keys
from ..redis.address import Client

Command = tuple[str | int, ...]

_NOBODY = "agx-doctor"  # a member, group, consumer and session that nobody has


@dataclass(frozen=True, slots=True)
class Rights:
    """By role, what the user lacks for it."""

    missing: dict[str, list[str]]

    @property
    def suffices_for(self) -> list[str]:
        return [role for role, lacks in self.missing.items() if not lacks]


async def find_rights(client: Client, prefix: str) -> Rights:
    """Try what each role needs; raises RedisError or OSError where the server does not answer."""
    session = keys.SessionKeys(prefix, _NOBODY, _NOBODY, uuid.uuid4().hex)
    missing: dict[str, list[str]] = {}
    for role, commands in _needs(prefix, session).items():
        missing[role] = [_named(command) for command in commands if not await _may(client, command)]
    channels = {
        "service": (session.wake_channel, session.cancel_channel),
        "worker": (session.wake_channel, session.cancel_channel, keys.jobs_wake_channel(prefix)),
        "listener": (session.wake_channel,),
    }
    for role, names in channels.items():
        missing[role] += [f"SUBSCRIBE {name.rpartition(':')[2]}" for name in names if not await _receives(client, name)]
    return Rights(missing)


def _needs(prefix: str, session: keys.SessionKeys) -> dict[str, list[Command]]:
    """Return what each role sends, with arguments that match nothing: a refusal comes before they are looked at."""
    reading: list[Command] = [("XRANGE", session.stream, "-", "+"), ("XREVRANGE", session.stream, "+", "-")]
    service = [*reading, *_service_commands(prefix, session)]
    return {
        "service": service,
        "worker": [*service, *_worker_commands(prefix)],
        "listener": [*reading, ("EXISTS", session.live), ("GET", session.live), *_index_reads(session)],
        "sidecar": [*reading, *_sidecar_commands(prefix, session)],
    }


def _index_reads(session: keys.SessionKeys) -> list[Command]:
    return [("ZRANGE", session.index, 0, -1), ("ZSCORE", session.index, _NOBODY)]


def _service_commands(prefix: str, session: keys.SessionKeys) -> list[Command]:
    queue, leases, jobs, meta = keys.queue(prefix, 0), keys.leases(prefix, 0), keys.jobs(prefix, 0), keys.meta(prefix)
    return [
        ("EXISTS", session.live),
        ("GET", session.live),
        ("GETEX", session.live, "PX", 1),
        ("SET", session.live, "x", "XX"),
        ("DEL", session.live),
        ("EVAL", "return 1", 1, session.live),
        ("EVAL", "return 1", 1, session.stream),
        ("XADD", session.stream, "NOMKSTREAM", "0-0", "x", "x"),
        ("EXPIRE", session.stream, 1),
        ("XDEL", session.inbox, "0-1"),
        *_approval_commands(prefix),
        ("ZADD", session.index, "XX", 0, "x"),
        *_index_reads(session),
        ("ZREM", session.index, "x"),
        ("EVAL", "return 1", 1, queue),
        ("XADD", queue, "NOMKSTREAM", "0-0", "x", "x"),
        ("ZADD", leases, "XX", 0, _NOBODY),
        ("ZREM", leases, _NOBODY),
        ("EVAL", "return 1", 1, meta),
        ("HGET", meta, "partitions"),
        ("EVAL", "return 1", 1, jobs),
        ("XADD", jobs, "NOMKSTREAM", "0-0", "x", "x"),
        ("XLEN", jobs),
        ("XACK", jobs, _NOBODY, "0-1"),
        ("XDEL", jobs, "0-1"),
        ("XRANGE", jobs, "-", "-"),
        ("TIME",),
        ("PUBLISH", session.wake_channel, "0-0"),
        ("PUBLISH", session.cancel_channel, ""),
        ("PUBLISH", keys.jobs_wake_channel(prefix), ""),
    ]


def _approval_commands(prefix: str) -> list[Command]:
    approvals = keys.approvals(prefix, 0)
    return [
        ("EVAL", "return 1", 1, approvals),
        ("HDEL", approvals, _NOBODY),
        ("HEXISTS", approvals, _NOBODY),
        ("HGET", approvals, _NOBODY),
        ("HGETALL", approvals),
        ("EXPIRE", approvals, 1, "GT"),  # never later than it is
    ]


def _worker_commands(prefix: str) -> list[Command]:
    jobs, workers, leases = keys.jobs(prefix, 0), keys.workers(prefix), keys.leases(prefix, 0)
    return [
        ("XPENDING", jobs, _NOBODY),
        ("XCLAIM", jobs, _NOBODY, _NOBODY, 0, "0-1"),
        ("XGROUP CREATE", jobs, _NOBODY, "none"),  # an invalid id: no group is made
        ("ZADD", workers, "XX", 0, _NOBODY),
        ("ZSCORE", workers, _NOBODY),
        ("SET", keys.room(prefix), "x", "NX", "XX"),  # a wrong syntax: nothing is set
        ("ZRANGEBYSCORE", leases, 1, 0),
    ]


def _sidecar_commands(prefix: str, session: keys.SessionKeys) -> list[Command]:
    queue, leases, meta = keys.queue(prefix, 0), keys.leases(prefix, 0), keys.meta(prefix)
    leader, metrics = keys.leader(prefix), keys.metrics(prefix)
    return [
        ("GET", session.live),
        ("EVAL", "return 1", 1, keys.jobs(prefix, 0)),
        ("XRANGE", keys.jobs(prefix, 0), "-", "-"),
        ("HKEYS", keys.approvals(prefix, 0)),
        ("EVAL", "return 1", 1, session.live),
        ("EVAL", "return 1", 1, session.stream),
        ("HGETALL", meta),
        ("EVAL", "return 1", 1, queue),
        ("EVAL", "return 1", 1, leases),
        ("ZRANGEBYSCORE", leases, 1, 0),
        ("ZREM", leases, _NOBODY),
        ("XREAD", "COUNT", 1, "STREAMS", queue, "$"),
        ("XREADGROUP", "GROUP", _NOBODY, _NOBODY, "COUNT", 1, "STREAMS", queue, ">"),
        ("XACK", queue, _NOBODY, "0-1"),
        ("XAUTOCLAIM", queue, _NOBODY, _NOBODY, 1, "0"),
        ("XPENDING", queue, _NOBODY),
        ("XINFO STREAM", queue),
        ("XINFO GROUPS", queue),
        ("XADD", queue, "NOMKSTREAM", "0-0", "x", "x"),
        ("EVAL", "return 1", 1, leader),
        ("GETRANGE", metrics, 0, 0),
        ("EVAL", "return 1", 1, metrics),
        ("INFO", "server"),
        ("TIME",),
        ("PUBLISH", session.wake_channel, "0-0"),
    ]


async def _may(client: Client, command: Command) -> bool:
    try:
        await client.execute_command(*command)
    except NoPermissionError:
        return False
    except ResponseError:
        return True  # no such group or key: but it was looked for
    return True


async def _receives(client: Client, channel: str) -> bool:
    listening = client.pubsub()
    try:
        await listening.subscribe(channel)
        await listening.get_message(timeout=3.0)
    except NoPermissionError:
        return False
    finally:
        await listening.aclose()  # type: ignore[no-untyped-call] # redis-py has no types here
    return True


def _named(command: Command) -> str:
    """Return a command with what kind of key it is for."""
    name = str(command[0])
    key = next((part for part in map(str, command[1:]) if ":" in part), "")
    kind = key.rpartition(":")[2] if key.endswith((":live", ":wake", ":cancel")) else ""
    if "::" in key:
        kind = key.partition("::")[2].partition(":")[0]
    return f"{name} {kind}".strip()
