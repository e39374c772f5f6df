"""Waits for entries of a scope queue, and reads where the queue stands."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import ResponseError

from agx.facts.reader import QueueEntry, parse_entries, read_page

from .link import BLOCK_MS, Link

TRACES_GROUP = "agx-traces"  # the consumer group of the traces sink

READ_COUNT = 200  # entries of a queue per command: a few milliseconds of folding
_READ_PAUSE = 0.05  # seconds from one read to the next


@dataclass(frozen=True, slots=True)
class QueueEnd:
    """Where a queue stands. `last_id` may be that of an entry that has gone; the other two are None without entries."""

    length: int
    last_id: str
    entries_added: int
    first_id: str | None
    last_entry: str | None


def group_partitions(link: Link, partitions: int) -> list[range]:
    """Return the partitions in groups that one command can read: one group; in a cluster, one group for each."""
    if isinstance(link.client, RedisCluster):
        return [range(n, n + 1) for n in range(partitions)]
    return [range(partitions)]


def entries_by_key(reply: Any) -> dict[str, list[QueueEntry]]:
    """Return the entries of an XREAD or XREADGROUP reply, RESP2 or RESP3, by key."""
    streams = reply.items() if isinstance(reply, dict) else reply or ()
    # RESP3 has a list of replies for each key.
    return {_text(key): parse_entries(raw[0] if isinstance(reply, dict) else raw) for key, raw in streams}


async def read_after(link: Link, places: Mapping[str, str]) -> dict[str, list[QueueEntry]]:
    """Wait up to BLOCK_MS for entries of some keys, each after an id."""
    reply = await link.call(
        "XREAD", "COUNT", READ_COUNT, "BLOCK", BLOCK_MS, "STREAMS", *places.keys(), *places.values()
    )
    return entries_by_key(reply)


async def pause_between_reads(found: Mapping[str, Sequence[QueueEntry]]) -> None:
    """Wait before the next read, so that it returns several facts; not if this read was full, since more wait then."""
    is_full = any(len(entries) >= READ_COUNT for entries in found.values())
    await asyncio.sleep(0.0 if is_full else _READ_PAUSE)


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
    page = await read_page(link.call, key, start=f"({after}", count=1)
    return page[0].id if page else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
