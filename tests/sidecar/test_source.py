"""How many commands a sidecar needs to read the queues."""

from __future__ import annotations

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from support.made_facts import started

from agx.facts.schema import FIELD, encode
from agx.redis import keys
from agx.redis.address import parse_redis
from agx_sidecar.link import Link, open_client
from agx_sidecar.source import group_partitions, read_after

PARTITIONS = 8


async def test_one_command_reads_all_queues(redis_url: str) -> None:
    link = Link(open_client(parse_redis(redis_url)))
    (together,) = group_partitions(link, PARTITIONS)
    places = {keys.queue("agx", n): "0-0" for n in together}
    async with Redis.from_url(redis_url) as redis:
        for n, key in enumerate(places):
            for _ in range(n % 3):
                await redis.xadd(key, {FIELD: encode(started(f"run-{n}"))})
                await redis.expire(key, 60)
        await redis.config_resetstat()
        found = await read_after(link, places)
        commands = await redis.info("commandstats")
    assert {key: len(entries) for key, entries in found.items()} == {
        key: n % 3 for n, key in enumerate(places) if n % 3
    }
    assert commands["cmdstat_xread"]["calls"] == 1
    await link.client.aclose()


def test_in_a_cluster_each_queue_is_read_alone() -> None:
    link = Link(RedisCluster(startup_nodes=[ClusterNode("h", 1)]))
    assert [list(group) for group in group_partitions(link, 3)] == [[0], [1], [2]]
