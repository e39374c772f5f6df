"""Key leaks: whatever agx leaves in Redis expires, or the test that left it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis

_NO_TTL = -1


@contextmanager
def leak_checked(url: str) -> Iterator[str]:
    """Give the URL of an emptied server; fail afterwards if a key without a TTL is left."""
    with Redis.from_url(url) as client:
        client.flushall()
        yield url
        leaked = lasting_keys(client)
        assert not leaked, f"keys without a TTL were left behind: {leaked}"


def lasting_keys(client: Redis) -> list[str]:
    """Return the keys that never expire."""
    return sorted(key.decode() for key in client.scan_iter(count=1000) if client.ttl(key) == _NO_TTL)
