"""What a run told: its stream and its facts, read straight from Redis."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import orjson
from redis.asyncio import Redis

from agx.facts import schema as facts
from agx.redis import keys

FactT = TypeVar("FactT", bound=facts.Fact)


@dataclass(frozen=True, slots=True)
class Told:
    """A session's stream and all facts in the queues, in their order."""

    events: list[dict[str, Any]]
    facts: list[facts.Fact]

    def of(self, kind: type[FactT]) -> list[FactT]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def one(self, kind: type[FactT]) -> FactT:
        found = self.of(kind)
        assert len(found) == 1, f"{len(found)} facts of {kind.__name__}"
        return found[0]

    def bodies(self, type: str) -> list[dict[str, Any]]:
        return [event["body"] for event in self.events if event["type"] == type]

    @property
    def text(self) -> str:
        """The text that listeners saw."""
        return "".join(
            body.get("content_delta") or body.get("content", "")
            for body in self.bodies("event")
            if body["event"] in ("part_start", "part_delta") and body["part_kind"] == "text"
        )


async def read_told(
    redis: Redis, *, scope: str = "1", user: str = "1", session: str = "s", prefix: str = "agx"
) -> Told:
    """Read what was told of a session."""
    stream = keys.SessionKeys.of(prefix, scope, user, session).stream
    events = [
        {
            "id": entry_id.decode(),
            "type": fields[b"type"].decode(),
            "origin": fields[b"origin"].decode(),
            "body": orjson.loads(fields.get(b"body", b"{}")),
        }
        for entry_id, fields in await _entries(redis, stream)
    ]
    return Told(events, await read_facts(redis, prefix=prefix))


async def read_facts(redis: Redis, *, prefix: str = "agx") -> list[facts.Fact]:
    """Read all facts, partition by partition."""
    partitions = int(await cast("Awaitable[Any]", redis.hget(keys.meta(prefix), "partitions")) or 0)
    return [
        facts.decode(fields[facts.FIELD.encode()])
        for n in range(partitions)
        for _, fields in await _entries(redis, keys.queue(prefix, n))
    ]


async def _entries(redis: Redis, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    # redis-py's types allow for every client there is; this one does not decode.
    return cast("list[tuple[bytes, dict[bytes, bytes]]]", await redis.xrange(stream))
