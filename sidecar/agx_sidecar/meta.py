"""Waits for the runtime's `::meta`: until a service has written it there is nothing to consume."""

from __future__ import annotations

import asyncio
import logging

from agx.redis import keys
from agx.redis.meta import FORMAT, Meta, parse_meta

from .link import Link

logger = logging.getLogger(__name__)

POLL = 1.0  # seconds between two looks while there is no meta
WATCH = 2.0  # seconds between two looks afterwards


class PartitionsChangedError(Exception):
    """The services agreed on another number of partitions: start over with those."""


async def read_meta(link: Link, prefix: str) -> Meta | None:
    """Return the meta, or None while there is none that is usable."""
    meta = parse_meta(await link.call("HGETALL", keys.meta(prefix)))
    if meta is not None and meta.is_newer:
        link.warnings.warn(f"{keys.meta(prefix)} has a newer format than {FORMAT}: update the sidecar")
    return meta


async def watch_meta(link: Link, prefix: str, partitions: int) -> None:
    """Look at the meta until its number of partitions changes.

    Raises:
        PartitionsChangedError: it has another number.
    """
    while True:
        await asyncio.sleep(WATCH)
        meta = await link.persist("read the runtime's meta", lambda: read_meta(link, prefix))
        if meta is not None and meta.partitions != partitions:
            raise PartitionsChangedError(f"{meta.partitions} partitions instead of {partitions}")


async def wait_for_meta(link: Link, prefix: str) -> Meta:
    """Poll until there is a meta."""
    waiting = False
    while True:
        meta = await link.persist("read the runtime's meta", lambda: read_meta(link, prefix))
        if meta is not None:
            return meta
        if not waiting:
            logger.info("no service has written %s yet: waiting for the first run", keys.meta(prefix))
            waiting = True
        await asyncio.sleep(POLL)
