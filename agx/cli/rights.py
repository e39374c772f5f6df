"""What the user of the URL may do: every command that a role needs is tried, in a form that changes nothing."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from redis.exceptions import NoPermissionError, ResponseError

from ..redis import keys
from ..redis.address import Client

Command = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Rights:
    """By role, what the user lacks for it."""

    missing: dict[str, list[str]]

    @property
    def suffices_for(self) -> list[str]:
        return [role for role, lacks in self.missing.items() if not lacks]


async def find_rights(client: Client, prefix: str) -> Rights:
    """Try what each role needs; raises RedisError or OSError where the server does not answer."""
    session = keys.SessionKeys(prefix, "agx-doctor", "agx-doctor", uuid.uuid4().hex)
    missing: dict[str, list[str]] = {}
    for role, commands in _needs(prefix, session).items():
        missing[role] = [_named(command) for command in commands if not await _may(client, command)]
    channels = {"service": (session.wake_channel, session.cancel_channel), "listener": (session.wake_channel,)}
    for role, names in channels.items():
        missing[role] += [f"SUBSCRIBE {name.rpartition(':')[2]}" for name in names if not await _receives(client, name)]
    return Rights(missing)


def _needs(prefix: str, session: keys.SessionKeys) -> dict[str, list[Command]]:
    """Return what each role sends, with arguments that match nothing: a refusal comes before they are looked at."""
    queue, leases, meta = keys.queue(prefix, 0), keys.leases(prefix, 0), keys.meta(prefix)
    leader, metrics = keys.leader(prefix), keys.metrics(prefix)
    group = "agx-doctor"
    read: list[Command] = [("XRANGE", session.stream, "-", "+"), ("XREVRANGE", session.stream, "+", "-")]
    return {
        "service": [
            *read,
            ("EXISTS", session.live),
            ("GET", session.live),
            ("GETEX", session.live, "PX", 1),
            ("SET", session.live, "x", "XX"),
            ("DEL", session.live),
            ("EVAL", "return 1", 1, session.live),
            ("EVAL", "return 1", 1, session.stream),
            ("XADD", session.stream, "NOMKSTREAM", "0-0", "x", "x"),
            ("EXPIRE", session.stream, 1),
            ("ZADD", session.index, "XX", 0, "x"),
            ("ZRANGE", session.index, 0, -1),
            ("ZREM", session.index, "x"),
            ("EVAL", "return 1", 1, queue),
            ("XADD", queue, "NOMKSTREAM", "0-0", "x", "x"),
            ("ZADD", leases, "XX", 0, group),
            ("ZREM", leases, group),
            ("EVAL", "return 1", 1, meta),
            ("HGET", meta, "partitions"),
            ("TIME",),
            ("PUBLISH", session.wake_channel, "0-0"),
            ("PUBLISH", session.cancel_channel, ""),
        ],
        "listener": [*read, ("EXISTS", session.live), ("GET", session.live), ("ZRANGE", session.index, 0, -1)],
        "sidecar": [
            *read,
            ("GET", session.live),
            ("EVAL", "return 1", 1, session.live),
            ("EVAL", "return 1", 1, session.stream),
            ("HGETALL", meta),
            ("ZRANGEBYSCORE", leases, 1, 0),
            ("ZREM", leases, group),
            ("XREAD", "COUNT", 1, "STREAMS", queue, "$"),
            ("XREADGROUP", "GROUP", group, group, "COUNT", 1, "STREAMS", queue, ">"),
            ("XACK", queue, group, "0-1"),
            ("XAUTOCLAIM", queue, group, group, 1, "0"),
            ("XPENDING", queue, group),
            ("XINFO STREAM", queue),
            ("XINFO GROUPS", queue),
            ("XADD", queue, "NOMKSTREAM", "0-0", "x", "x"),
            ("EVAL", "return 1", 1, leader),
            ("GETRANGE", metrics, 0, 0),
            ("EVAL", "return 1", 1, metrics),
            ("INFO", "server"),
            ("TIME",),
            ("PUBLISH", session.wake_channel, "0-0"),
        ],
    }


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
