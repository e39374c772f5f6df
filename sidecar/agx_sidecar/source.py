"""Reads a partition: entries after an id, where the queue stands, and the ids of facts already read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson
from redis.exceptions import ResponseError

from agx.facts.schema import FIELD

from .link import BLOCK_MS, Link

Entry = tuple[str, bytes | None]  # id, and the fact as JSON where the entry has one

TRACES_GROUP = "agx-traces"  # the consumer group of the traces sink

READ_COUNT = 200  # entries per command: a few milliseconds of folding

_FIELD = FIELD.encode()


@dataclass(frozen=True, slots=True)
class QueueEnd:
    """Where a queue stands. `last_id` may be that of an entry that has gone; the other two are None without entries."""

    length: int
    last_id: str
    entries_added: int
    first_id: str | None
    last_entry: str | None


def id_parts(entry_id: str) -> tuple[int, int]:
    """Return an entry's id in a form that compares."""
    ms, _, counter = entry_id.partition("-")
    return int(ms), int(counter)


def parse_entries(raw: Any) -> list[Entry]:
    """Return entries from a server's reply; None for the payload of one without the field."""
    entries = []
    for entry_id, fields in raw or ():
        payload = None
        for position in range(0, len(fields or ()), 2):
            if fields[position] == _FIELD:
                payload = fields[position + 1]
        entries.append((entry_id.decode(), payload))
    return entries


def of_one_stream(reply: Any) -> list[Entry]:
    """Return the entries of an XREAD or XREADGROUP reply, RESP2 or RESP3, that asked for one stream."""
    if not reply:
        return []
    raw = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
    return parse_entries(raw)


async def read_after(link: Link, key: str, after: str) -> list[Entry]:
    """Wait up to BLOCK_MS for entries after an id."""
    reply = await link.call("XREAD", "COUNT", READ_COUNT, "BLOCK", BLOCK_MS, "STREAMS", key, after)
    return of_one_stream(reply)


async def find_end(link: Link, key: str) -> QueueEnd | None:
    """Return where a queue stands, or None if there is no such key."""
    try:
        reply = await link.call("XINFO STREAM", key)
    except ResponseError as error:
        if "no such key" in str(error).lower():
            return None
        raise
    first, last = reply["first-entry"], reply["last-entry"]
    return QueueEnd(
        length=int(reply["length"]),
        last_id=_text(reply["last-generated-id"]),
        entries_added=int(reply["entries-added"]),
        first_id=_text(first[0]) if first else None,
        last_entry=_text(last[0]) if last else None,
    )


async def first_id_after(link: Link, key: str, after: str) -> str | None:
    """Return the id of the first entry after an id."""
    reply = await link.call("XRANGE", key, f"({after}", "+", "COUNT", 1)
    return str(reply[0][0].decode()) if reply else None


async def fact_ids_before(link: Link, key: str, until: str) -> AsyncIterator[tuple[int, list[str]]]:
    """Yield, newest first, the fact ids of the entries up to `until`, in pages with the time (ms) of their oldest."""
    start = until
    while True:
        page = parse_entries(await link.call("XREVRANGE", key, start, "-", "COUNT", 1_000))
        if not page:
            return
        yield id_parts(page[-1][0])[0], [fact_id for _, payload in page if (fact_id := _fact_id(payload))]
        start = f"({page[-1][0]}"


def _fact_id(payload: bytes | None) -> str | None:
    try:
        raw = orjson.loads(payload or b"")
    except orjson.JSONDecodeError:
        return None
    fact_id = raw.get("id") if isinstance(raw, dict) else None
    return fact_id if isinstance(fact_id, str) else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
