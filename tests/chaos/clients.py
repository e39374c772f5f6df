"""A redis-py client for a URL of any engine, as a service would make it."""

from __future__ import annotations

from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import Sentinel


def open_client(url: str) -> Redis | RedisCluster:
    """Return a client for `redis://`, `redis+cluster://` or `redis+sentinel://`, as the sidecar writes them."""
    parts = urlsplit(url)
    hosts = [(host, int(port)) for host, _, port in (place.partition(":") for place in parts.netloc.split(","))]
    if parts.scheme == "redis+cluster":
        return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in hosts])
    if parts.scheme == "redis+sentinel":
        master = parts.path.split("/")[1]
        client: Redis = Sentinel(hosts).master_for(master)  # type: ignore[no-untyped-call] # redis-py has no types here
        return client
    return Redis.from_url(url)
