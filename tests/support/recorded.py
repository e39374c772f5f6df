"""What runs recorded, read straight from Redis: the entries of a session stream and the facts of the scope queues."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import orjson
from redis.asyncio import Redis

from agx.facts import schema as facts
from agx.facts.decoding import decode
from agx.redis import keys

FactT = TypeVar("FactT", bound=facts.Fact)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a session stream as it stands there."""

    id: str
    type: str
    origin: str
    body: dict[str, Any]
    fields: tuple[str, ...]
    own_seq: str | None = None  # the entry's own field `seq`, where the body's is a user's

    @property
    def seq(self) -> int | None:
        """The number that the run gave the entry."""
        if self.own_seq is None:
            return self.body.get("seq")
        return int(self.own_seq) if self.own_seq else None

    @property
    def name(self) -> str:
        """`begin`, `end`, ..., and for `event` its kind: `llm-begin`, `part_start`, ..."""
        return self.body["event"] if self.type == "event" else self.type


@dataclass(frozen=True, slots=True)
class Recorded:
    """The entries of a session's stream, and all facts in the queues, in their order."""

    entries: list[Entry]
    facts: list[facts.Fact]

    def of(self, kind: type[FactT]) -> list[FactT]:
        return of_kind(kind, self.facts)

    def one(self, kind: type[FactT]) -> FactT:
        found = self.of(kind)
        assert len(found) == 1, f"{len(found)} facts of {kind.__name__}"
        return found[0]

    def bodies(self, type: str) -> list[dict[str, Any]]:
        return [entry.body for entry in self.entries if entry.type == type]

    @property
    def text(self) -> str:
        return text_of(self.entries)


async def read_recorded(client: Redis, session: str = "agx:1:1:s", *, prefix: str = "agx") -> Recorded:
    """Read a session's stream and the facts of all runs; `session` is the stream's key."""
    return Recorded(await read_stream(client, session), await read_facts(client, prefix))


async def read_stream(client: Redis, session: str = "agx:1:1:s") -> list[Entry]:
    """Return the entries of a session's stream, with any kind of client; `session` is the stream's key."""
    return [
        Entry(
            entry_id,
            values["type"],
            values["origin"],
            orjson.loads(values.get("body", "{}")),
            tuple(values),
            values.get("seq"),
        )
        for entry_id, values in await _range(client, session)
    ]


async def read_facts(client: Redis, prefix: str = "agx") -> list[facts.Fact]:
    """Return all facts, partition by partition."""
    partitions = int(await cast("Awaitable[Any]", client.hget(keys.meta(prefix), "partitions")) or 0)
    return [
        decode(fields[facts.FIELD].encode())
        for n in range(partitions)
        for _, fields in await _range(client, keys.queue(prefix, n))
    ]


def of_kind(kind: type[FactT], all_facts: Sequence[facts.Fact]) -> list[FactT]:
    """Return the facts of one kind."""
    return [fact for fact in all_facts if isinstance(fact, kind)]


def check_seq(entries: list[Entry]) -> None:
    """Fail unless the run's own entries are numbered 0, 1, 2, ... and their ids rise."""
    own = [entry.seq for entry in entries if entry.seq is not None]
    assert own == list(range(len(own))), own
    ids = [tuple(map(int, entry.id.split("-"))) for entry in entries]
    assert ids == sorted(set(ids)), ids


def text_of(entries: list[Entry], kind: str = "text") -> str:
    """Return what a listener of the run itself puts together from the starts and deltas of one kind of part."""
    return "".join(
        entry.body.get("content_delta", "") or entry.body.get("content", "")
        for entry in entries
        if entry.type == "event" and entry.origin != "sub-agent" and entry.body.get("part_kind") == kind
    )


async def _range(client: Redis, key: str) -> list[tuple[str, dict[str, str]]]:
    entries: Any = await client.xrange(key)
    return [
        (_text(entry_id), {_text(name): _text(value) for name, value in fields.items()}) for entry_id, fields in entries
    ]


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
