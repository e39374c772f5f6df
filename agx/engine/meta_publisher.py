"""The meta publisher: writes `::meta` for the sidecar and reads the number of partitions in force."""

from __future__ import annotations

from ..redis import keys
from ..redis.bus import Bus
from ..redis.meta import PUBLISH, Meta


class MetaPublisher:
    """Writes what this configuration needs into the prefix's `::meta` (codec: `agx.redis.meta`)."""

    def __init__(self, bus: Bus, prefix: str, meta: Meta) -> None:
        self._bus = bus
        self._key = keys.meta(prefix)
        self._meta = meta
        self.partitions: int | None = None  # in force on this prefix; None until the first publication

    async def publish(self) -> int:
        """Write the meta and return the number of partitions in force; raises RedisError or OSError."""
        self.partitions = int(await self._bus.run(PUBLISH, self._key, *self._meta.to_args()))
        return self.partitions

    def refresh(self) -> None:
        """Write the meta again, if it was published before: it expires, and a failed server may have lost it."""
        if self.partitions is not None:
            self._bus.run(PUBLISH, self._key, *self._meta.to_args())
