"""Waits for the runtime's `::meta`: until a service has written it there is nothing to consume."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from agx.facts.schema import FORMAT
from agx.redis import keys

from .link import Link

logger = logging.getLogger(__name__)

POLL = 1.0  # seconds between two looks while there is no meta
WATCH = 2.0  # seconds between two looks afterwards


class PartitionsChangedError(Exception):
    """The services agreed on another number of partitions: start over with those."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the services agreed on: partitions, and the longest lease in seconds."""

    partitions: int
    lease_ttl: float


async def read_meta(link: Link, prefix: str) -> Meta | None:
    """Return the meta, or None while there is none that can be understood."""
    raw = await link.call("HGETALL", keys.meta(prefix))
    fields = {_text(name): _text(value) for name, value in raw.items()}
    try:
        meta = Meta(int(fields["partitions"]), float(fields.get("lease_ttl", 15)))
        if meta.partitions < 1:
            return None
        if int(fields.get("format", FORMAT)) > FORMAT:
            link.complain_once(f"{keys.meta(prefix)} has a newer format than {FORMAT}: update the sidecar")
    except (KeyError, ValueError):
        return None
    return meta


async def watch_meta(link: Link, prefix: str, partitions: int) -> None:
    """Look at the meta for as long as it says so many partitions.

    Raises:
        PartitionsChangedError: it says another number.
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


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
