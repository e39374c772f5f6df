"""Measures the queues for both sinks: facts that wait, how long, and how many were trimmed unread (contract, 7).

Trims come from the server's own count of entries less the sink's; XINFO's `lag` is not to be trusted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from agx.redis.entry_id import parse_id

from ..link import Link
from ..source import (
    TRACES_GROUP,
    QueueEnd,
    find_end,
    first_id_after,
)
from .fold import ZERO_ID, Position, TracesTrims

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The facts of one partition that a sink has yet to read."""

    length: int = 0
    lag_ms: int = 0


async def measure_metrics(link: Link, key: str, position: Position) -> Waiting:
    """Return what waits for the metrics sink; moves `position` where the queue was trimmed or began anew."""
    # The reader goes on while we ask: the reply is compared with where it stood before.
    last_id, count = position.last_id, position.count
    end = await find_end(link, key)
    if end is None:
        return Waiting()
    if parse_id(end.last_id) < parse_id(last_id) or end.entries_added < count:
        _start_over(key, end, position)
    elif end.last_id == last_id:
        position.trimmed = max(position.trimmed, end.entries_added - count)
        return Waiting()
    first = await first_id_after(link, key, position.last_id)
    if first is None:
        return Waiting()
    unread = end.entries_added - position.count - position.trimmed
    return Waiting(min(end.length, max(1, unread)), _age(link, first))


def _start_over(key: str, end: QueueEnd, position: Position) -> None:
    """Read the queue from its start; what is known is passed over.

    What went from a queue that still has some of ours was counted before it went.
    """
    logger.warning("%s began anew (Redis lost data, or it had expired): reading it from its start", key)
    is_ours = end.first_id is not None and parse_id(end.first_id) <= parse_id(position.last_id)
    gone = end.entries_added - end.length if is_ours else 0
    position.count = gone - position.trimmed
    position.last_id = ZERO_ID


async def measure_traces(link: Link, key: str, trims: TracesTrims) -> Waiting | None:
    """Return what waits for the traces sink, undelivered or unacknowledged; None if no such sink ever read."""
    group = await _find_group(link, key)
    end = await find_end(link, key)
    if group is None or end is None:
        return None
    delivered = group["last-delivered-id"].decode()
    read = int(group["entries-read"] or 0)
    oldest = await first_id_after(link, key, delivered)
    undelivered = 0
    if end.last_id == delivered:
        trims.sync(end.entries_added - read)
    elif end.first_id is not None and parse_id(delivered) < parse_id(end.first_id):
        trims.miss(end.entries_added - end.length - read)
        undelivered = end.length
    elif oldest is not None:
        undelivered = min(end.length, max(1, end.entries_added - read - trims.at_sync))
    if group["pending"]:
        summary = await link.call("XPENDING", key, TRACES_GROUP)
        if summary["min"]:
            oldest = summary["min"].decode()
    return Waiting(undelivered + int(group["pending"]), _age(link, oldest) if oldest else 0)


async def _find_group(link: Link, key: str) -> dict[str, Any] | None:
    try:
        groups = await link.call("XINFO GROUPS", key)
    except ResponseError as error:
        if "no such key" in str(error).lower():
            return None
        raise
    return next((group for group in groups if group["name"] == TRACES_GROUP.encode()), None)


def _age(link: Link, entry_id: str) -> int:
    return max(0, link.now_ms() - parse_id(entry_id)[0])
