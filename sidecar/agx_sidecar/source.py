"""Waits for entries of a scope queue, and reads where the queue stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import ResponseError

from agx.facts.decoding import decode
from agx.facts.reader import QueueEntry, parse_entries
from agx.facts.schema import Fact

from .link import BLOCK_MS, Link

Decode = Callable[[bytes], tuple[Fact, bool]]  # returns a fact, and whether it was repaired

TRACES_GROUP = "agx-traces"  # the consumer group of the traces sink

READ_COUNT = 200  # entries of a queue per command: a few milliseconds of folding
READ_PAUSE = 0.2  # seconds from a read that had entries to the next
_CACHED_FACTS = 512  # more than one sink of a replica is ahead of the other


# For `call_each()`: the fields of `QueueState`, then those of `GroupState`. `next_id` is that of the entry after the
# id `argument`.
_READ_STATE = """
local function to_table(flat)
  local of = {}
  for at = 1, #flat, 2 do of[flat[at]] = flat[at + 1] end
  return of
end
local function after(id)
  local found = redis.call('XRANGE', key, '(' .. id, '+', 'COUNT', 1)[1]
  return found and found[1] or ''
end
local info = redis.pcall('XINFO', 'STREAM', key)
if info.err then return string.find(info.err, 'no such key') and {} or info end
local stream = to_table(info)
local first, last = stream['first-entry'], stream['last-entry']
local reply = {
  stream['length'], stream['entries-added'], stream['last-generated-id'],
  first and first[1] or '', last and last[1] or '', after(argument)
}
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', key)) do
  local group = to_table(flat)
  if group['name'] == TRACES then
    local delivered, oldest = group['last-delivered-id'], ''
    if group['pending'] > 0 then oldest = redis.call('XPENDING', key, TRACES)[2] or '' end
    for _, value in ipairs({group['entries-read'] or 0, group['pending'], delivered, after(delivered), oldest}) do
      reply[#reply + 1] = value
    end
  end
end
return reply
""".replace("TRACES", repr(TRACES_GROUP))


@dataclass(frozen=True, slots=True)
class GroupState:
    """Where the traces group stands in a queue."""

    entries_read: int
    pending: int  # delivered, and not acknowledged
    delivered_id: str
    next_id: str | None  # of the first entry that is not delivered
    oldest_id: str | None  # of the oldest pending entry


@dataclass(frozen=True, slots=True)
class QueueState:
    """Where a queue stands. `last_id` may be that of an entry that is gone."""

    length: int
    entries_added: int
    last_id: str
    first_entry: str | None
    last_entry: str | None
    next_id: str | None  # of the first entry after the id that was asked about
    group: GroupState | None


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
    if not places:
        await asyncio.sleep(BLOCK_MS / 1_000)
        return {}
    reply = await link.call(
        "XREAD", "COUNT", READ_COUNT, "BLOCK", BLOCK_MS, "STREAMS", *places.keys(), *places.values()
    )
    return entries_by_key(reply)


def decode_fact(payload: bytes) -> tuple[Fact, bool]:
    """Return a fact, and whether it was repaired; raises as `decode()`."""
    repairs: list[bool] = []
    fact = decode(payload, lambda: repairs.append(True))
    return fact, bool(repairs)


def make_caching_decoder() -> Decode:
    """Return `decode_fact()` with a cache, for two sinks that read the same facts at about the same time."""
    return lru_cache(maxsize=_CACHED_FACTS)(decode_fact)


async def pause_between_reads(found: Mapping[str, Sequence[QueueEntry]]) -> None:
    """Wait before the next read, so that it returns several facts; not if this read was full, since more wait then."""
    is_full = any(len(entries) >= READ_COUNT for entries in found.values())
    await asyncio.sleep(0.0 if is_full else READ_PAUSE)


def is_no_queue(error: ResponseError) -> bool:
    """Return whether a command was refused because a queue or its traces group is missing, or the key is no stream."""
    return str(error).startswith(("NOGROUP", "WRONGTYPE")) or "no such key" in str(error).lower()


async def read_states(link: Link, after: Mapping[str, str]) -> dict[str, QueueState | ResponseError | None]:
    """Return where queues stand, with the entry that follows an id of each; None for a missing key, or an error."""
    replies = await link.call_each(_READ_STATE, after)
    return {key: reply if isinstance(reply, ResponseError) else _parse_state(reply) for key, reply in replies.items()}


def _parse_state(reply: list[Any]) -> QueueState | None:
    if not reply:
        return None
    length, added, last_id, first, last, next_id, *of_group = reply
    group = None
    if of_group:
        entries_read, pending, delivered, undelivered, oldest = of_group
        group = GroupState(int(entries_read), int(pending), _text(delivered), _id(undelivered), _id(oldest))
    return QueueState(int(length), int(added), _text(last_id), _id(first), _id(last), _id(next_id), group)


def _id(value: bytes) -> str | None:
    return _text(value) or None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
