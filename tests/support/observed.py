"""What a run left behind, read straight from Redis: the entries of its stream and the facts of the scope queues."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio import Redis

from agx.facts import schema as facts
from agx.redis import keys

F = TypeVar("F", bound=facts.RunFact)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a session stream as it stands there."""

    id: str
    type: str
    origin: str
    body: dict[str, Any]
    fields: tuple[str, ...]

    @property
    def said(self) -> str:
        """`begin`, `end`, ..., and for `event` what kind of one."""
        return self.body["event"] if self.type == "event" else self.type


async def read_stream(client: Redis, session: str = "agx:1:1:s") -> list[Entry]:
    """Return a session stream's entries, with any kind of client."""
    return [
        Entry(entry_id, values["type"], values["origin"], json.loads(values.get("body", "{}")), tuple(values))
        for entry_id, values in await _range(client, session)
    ]


async def read_facts(client: Redis, prefix: str = "agx", partitions: int = 8) -> list[facts.RunFact]:
    """Return every fact about runs, in order per scope; `process` facts are left out."""
    found: list[facts.RunFact] = []
    for n in range(partitions):
        for _, fields in await _range(client, keys.queue(prefix, n)):
            fact = facts.decode(fields[facts.FIELD].encode())
            if isinstance(fact, facts.RunFact):
                found.append(fact)
    return found


async def _range(client: Redis, key: str) -> list[tuple[str, dict[str, str]]]:
    entries: Any = await client.xrange(key)
    return [
        (_text(entry_id), {_text(name): _text(value) for name, value in fields.items()}) for entry_id, fields in entries
    ]


def of_kind(kind: type[F], all_facts: list[facts.RunFact]) -> list[F]:
    """Return the facts of one kind."""
    return [fact for fact in all_facts if isinstance(fact, kind)]


def check_seq(entries: list[Entry]) -> None:
    """Fail unless the run's own entries are numbered 0, 1, 2, ... and their ids rise."""
    own = [entry.body["seq"] for entry in entries if "seq" in entry.body]
    assert own == list(range(len(own))), own
    ids = [tuple(map(int, entry.id.split("-"))) for entry in entries]
    assert ids == sorted(set(ids)), ids


def text_of(entries: list[Entry], kind: str = "text") -> str:
    """Return what a listener puts together from the starts and deltas of one kind of part."""
    return "".join(
        entry.body.get("content_delta", "") or entry.body.get("content", "")
        for entry in entries
        if entry.type == "event" and entry.body.get("part_kind") == kind
    )


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
