"""The hub under load: everybody gets everything once and in order, and a listener that leaves leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine

SESSIONS = [f"s{n}" for n in range(20)]
EVENTS = 60  # a session, besides `begin` and `end`
JOINS = 1_000
MOST_CONNECTIONS = 4  # appends, control, reads, subscription


class Looking(Redis):
    """A client that sees what agx has at the server."""

    others = 0  # connections that are not agx's

    async def count_connections(self) -> int:
        return len(await self.client_list()) - self.others


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Looking]:
    """agx with a client of its own, and one for the test to look with."""
    async with Redis.from_url(redis_url) as ours, Looking.from_url(redis_url) as looking:
        looking.others = len(await looking.client_list())
        agx.configure(agx.Config(redis=ours))
        yield looking
        await agx.aclose()


async def write(session: str, dice: random.Random) -> None:
    """Fill one session, in bursts, so that reads and wake-ups overlap in every way."""
    for n in range(EVENTS):
        await agx.add(1, 1, session, type="info", origin="test", body={"n": n})
        if dice.random() < 0.3:
            await asyncio.sleep(dice.random() * 0.03)
    await agx.stop(1, 1, session, grace_period=60)


def check_order(events: list[dict[str, Any]], first: int) -> None:
    assert [event["body"]["seq"] for event in events] == list(range(first, first + len(events)))


async def follow(session: str, dice: random.Random, outcomes: Counter[str]) -> None:
    """Join, perhaps leave early, perhaps resume where one left, and check what came."""
    delivered: list[dict[str, Any]] = []
    after: str | None = None
    rounds = dice.choice([1, 1, 2, 3])
    for left in reversed(range(rounds)):
        leave_at = dice.randrange(1, EVENTS) if left or dice.random() < 0.3 else None
        taken = 0
        async with aclosing(agx.listen(1, 1, session, serialize=False, after=after)) as events:
            async for event in events:
                delivered.append(event)
                after = event["id"]
                taken += 1
                if taken == leave_at:
                    break
        if delivered and delivered[-1]["type"] == "end":
            break
    check_order(delivered, 0)
    complete = delivered[-1]["type"] == "end"
    assert not complete or len(delivered) == EVENTS + 2
    outcomes["complete" if complete else "left"] += 1


async def test_a_thousand_joins_leaves_and_cancels(redis: Looking) -> None:
    dice = random.Random(7)
    outcomes: Counter[str] = Counter()
    for session in SESSIONS:
        await agx.start(1, 1, session)
    before = asyncio.all_tasks()
    writers = [asyncio.create_task(write(session, random.Random(session))) for session in SESSIONS]
    followers: list[asyncio.Task[None]] = []
    cancelled: list[asyncio.Task[None]] = []
    most_connections = 0
    for n in range(JOINS):
        followers.append(asyncio.create_task(follow(dice.choice(SESSIONS), random.Random(n), outcomes)))
        if dice.random() < 0.3 and (listening := [task for task in followers if not task.done()]):
            victim = dice.choice(listening)
            followers.remove(victim)
            cancelled.append(victim)
            victim.cancel()
        if n % 5 == 0:
            await asyncio.sleep(dice.random() * 0.01)
        if n % 100 == 0:
            most_connections = max(most_connections, await redis.count_connections())
    await asyncio.gather(*writers)
    await asyncio.gather(*followers)
    await asyncio.gather(*cancelled, return_exceptions=True)

    for task in cancelled:
        assert task.cancelled() or task.exception() is None
    assert outcomes["complete"] > JOINS / 4
    assert outcomes["left"] > JOINS / 20
    assert sum(task.cancelled() for task in cancelled) > JOINS / 5
    assert most_connections <= MOST_CONNECTIONS
    await check_nothing_is_left(redis, before)


async def check_nothing_is_left(redis: Looking, before: set[asyncio.Task[Any]]) -> None:
    """No task but those of hub and subscription, no connection beyond the few, no channel of those who left."""
    await wait_until(lambda: listeners() == 0)
    kept = {"agx-subscription", "agx-hub-poll"}
    await wait_until(lambda: {task.get_name() for task in asyncio.all_tasks() - before} <= kept)
    assert len(asyncio.all_tasks() - before) <= len(kept)
    assert await redis.count_connections() <= MOST_CONNECTIONS
    await wait_until(lambda: unsubscribed(redis))


async def unsubscribed(redis: Redis) -> bool:
    return not await redis.pubsub_channels()


def listeners() -> int:
    from agx.engine.registry import current_engine

    return current_engine().hub.listeners


async def test_everybody_on_one_session(redis: Looking) -> None:
    """300 listeners of one session share what is read; each gets all of it, whenever it joined."""
    await agx.start(1, 1, "s")
    before = asyncio.all_tasks()
    outcomes: Counter[str] = Counter()

    async def whole() -> None:
        delivered = [event async for event in agx.listen(1, 1, "s", serialize=False)]
        check_order(delivered, 0)
        assert len(delivered) == EVENTS + 2
        outcomes["complete"] += 1

    writer = asyncio.create_task(write("s", random.Random(1)))
    reads = (await redis.info("commandstats")).get("cmdstat_xrange", {}).get("calls", 0)
    followers = []
    for n in range(300):
        followers.append(asyncio.create_task(whole()))
        if n % 10 == 0:
            await asyncio.sleep(0.002)
    await asyncio.gather(writer, *followers)
    reads = (await redis.info("commandstats"))["cmdstat_xrange"]["calls"] - reads
    assert outcomes["complete"] == 300
    # Each catches up by itself, with two or three reads; what comes then is read once for all.
    assert reads < 300 * 6 + EVENTS * 3
    await check_nothing_is_left(redis, before)


async def test_a_slow_listener_is_not_skipped(redis: Looking) -> None:
    """It falls behind its queue, reads for itself again, and misses nothing; nobody waits for it."""
    from agx.engine.registry import current_engine
    from agx.stream.hub import QUEUE

    count = 3 * QUEUE
    await agx.start(1, 1, "s")
    slow = agx.listen(1, 1, "s", serialize=False)
    delivered = [await anext(slow)]

    async def quick() -> int:
        return len([event async for event in agx.listen(1, 1, "s")])

    quickly = asyncio.create_task(quick())
    await agx.add(1, 1, "s", type="info", origin="test", body={"n": -1})
    delivered.append(await anext(slow))  # it is caught up: entries are handed to it from here on
    for n in range(count):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
        if n % 200 == 0:
            await asyncio.sleep(0.001)
    await agx.stop(1, 1, "s", grace_period=60)
    assert await quickly == count + 3
    delivered += [event async for event in slow]
    check_order(delivered, 0)
    assert len(delivered) == count + 3
    assert current_engine().hub.rereads > 0


async def test_writers_without_wake_ups_are_noticed(redis: Looking) -> None:
    """A seed client sends none: it is looked at once a second."""
    stream = "agx:1:1:seed"
    delivered: list[dict[str, Any]] = []

    async def hear() -> None:
        async for event in agx.listen(1, 1, "seed", serialize=False):
            delivered.append(event)  # noqa: PERF401 - it is looked at meanwhile

    await redis.xadd(stream, {"type": "begin", "origin": "seed", "body": "{}"})
    await redis.expire(stream, 60)
    hearing = asyncio.create_task(hear())
    await wait_until(lambda: len(delivered) == 1)
    for n in range(3):
        await redis.xadd(stream, {"type": "info", "origin": "seed", "body": f'{{"n": {n}}}'})
        await wait_until(lambda n=n: len(delivered) == n + 2)
    await redis.xadd(stream, {"type": "end", "origin": "seed"})
    await hearing
    assert [event["type"] for event in delivered] == ["begin", "info", "info", "info", "end"]


async def test_a_broken_connection_loses_no_listener(redis: Looking) -> None:
    """Subscription and reads break again and again; every listener goes on where it was."""
    await agx.start(1, 1, "s")
    outcomes: Counter[str] = Counter()

    async def whole() -> None:
        delivered = [event async for event in agx.listen(1, 1, "s", serialize=False)]
        check_order(delivered, 0)
        outcomes["complete"] += delivered[-1]["type"] == "end"

    followers = [asyncio.create_task(whole()) for _ in range(20)]
    for n in range(40):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
        if n % 10 == 5:
            await redis.client_kill_filter(_type="pubsub", skipme=True)
            await redis.client_kill_filter(_type="normal", skipme=True)
    await agx.stop(1, 1, "s", grace_period=60)
    await asyncio.gather(*followers)
    assert outcomes["complete"] == 20


async def test_wake_ups_bring_the_entries_and_nothing_is_read(redis: Looking) -> None:
    await agx.start(1, 1, "s")
    delivered: list[dict[str, Any]] = []

    async def follow_all() -> None:
        async for event in agx.listen(1, 1, "s", serialize=False):
            delivered.append(event)  # noqa: PERF401 - it is looked at meanwhile

    following = asyncio.create_task(follow_all())
    await wait_until(lambda: delivered)
    await agx.add(1, 1, "s", type="info", origin="first")
    await wait_until(lambda: len(delivered) == 2)
    (feed,) = current_engine().hub._feeds.values()
    await wait_until(lambda: not feed._reading)
    reads = 0
    execute = feed._bus.execute

    def count(*args: Any) -> asyncio.Future[Any]:
        nonlocal reads
        reads += args[0] == "XRANGE"
        return execute(*args)

    feed._bus.execute = count  # type: ignore[method-assign]
    for n in range(20):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
        await wait_until(lambda n=n: len(delivered) == n + 3)
    assert reads == 0
    # An entry that is not our writer's has a wake-up without it, and so the stream is read.
    await redis.xadd("agx:1:1:s", {"type": "info", "origin": "another", "body": "{}"})
    await agx.add(1, 1, "s", type="info", origin="after it")
    await wait_until(lambda: len(delivered) == 24)
    assert [event["origin"] for event in delivered[-2:]] == ["another", "after it"]
    # Too large for a wake-up, too many, and a name with line breaks.
    await agx.add(1, 1, "s", type="info", origin="large", body={"text": "x" * 5_000})
    for n in range(9):
        await agx.add(1, 1, "s", type="info", origin=f"many {n}")
    await agx.add(1, 1, "s", type="info", origin="two\nlines")
    await agx.stop(1, 1, "s", grace_period=60)
    await following
    check_order([event for event in delivered if event["origin"] != "another"], 0)
    assert [event["origin"] for event in delivered[24:-1]] == ["large", *(f"many {n}" for n in range(9)), "two\nlines"]
