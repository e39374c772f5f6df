"""A replica's own counters have each entry once, also where it leads twice and reads the same facts again."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis
from support.made_facts import started
from support.replica import Queue
from support.waiting import wait_until

from agx.redis import keys
from agx.redis.address import parse_redis
from agx_sidecar.link import Link, open_client
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.series import Series
from agx_sidecar.metrics.sink import MetricsSink


async def test_a_leader_that_lost_its_lease_before_it_wrote_the_state(queue: Queue, redis_url: str) -> None:
    own, stop = Series(), asyncio.Event()
    link = Link(open_client(parse_redis(redis_url)))
    sink = MetricsSink(link, "agx", 0.3, own)
    running = asyncio.create_task(sink.run(4, stop))
    async with Redis.from_url(redis_url) as redis:

        async def count(expected: int) -> None:
            def is_counted() -> bool:
                shown = sink.sample().get(i.RUNS_STARTED, [])
                return sum(int(one.value) for one in shown) == expected

            await wait_until(is_counted)

        await wait_until(lambda: sink.exporting)
        queue.add(*(started(f"a-{n}") for n in range(20)))
        queue.add_raw([(keys.queue("agx", 0), b"no fact")])
        await count(20)
        assert own.counter(i.FACTS, "run.start").value == 20
        # Another replica has the lease for a moment, and writes nothing.
        await redis.set(keys.leader("agx"), "another", px=100)
        await wait_until(lambda: not sink.exporting)
        await count(20)
        queue.add(*(started(f"b-{n}") for n in range(3)))
        await count(23)
    assert own.counter(i.FACTS, "run.start").value == 23
    assert own.counter(i.FACTS, "repeat").value == 0
    assert own.counter(i.MALFORMED).value == 1
    stop.set()
    await running
    await link.client.aclose()
