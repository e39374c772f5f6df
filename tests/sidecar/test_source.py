"""How many commands a sidecar needs for all partitions, and keys of another type in the place of a queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.exceptions import ResponseError
from support.made_facts import ended, started
from support.otlp import OtlpReceiver
from support.replica import Queue, StartReplica
from support.waiting import wait_until, wait_until_sync

from agx.facts.schema import FIELD, Fact, encode
from agx.redis import keys
from agx.redis.address import parse_redis
from agx_sidecar.link import Link, open_client
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.gauges import Backlog, TracesTrims, count_approvals, count_jobs, count_live
from agx_sidecar.metrics.series import Series
from agx_sidecar.metrics.sink import CatchUp, MetricsSink
from agx_sidecar.recovery.reaper import Reaper
from agx_sidecar.source import TRACES_GROUP, QueueState, group_partitions, read_after, read_states
from agx_sidecar.traces.export import Item
from agx_sidecar.traces.sink import TracesSink

PARTITIONS = 8
QUEUES = [keys.queue("agx", n) for n in range(PARTITIONS)]


class CountingLink(Link):
    """Counts the commands."""

    sent = 0

    async def call(self, *command: Any) -> Any:
        self.sent += 1
        return await super().call(*command)


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[CountingLink]:
    link = CountingLink(open_client(parse_redis(redis_url)))
    yield link
    await link.client.aclose()


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


async def reap(link: Link) -> None:
    reaper = Reaper(link, "agx")
    await reaper._sweep(PARTITIONS)  # the first look asks for the server and the meta too
    link.sent = 0  # type: ignore[attr-defined] # a CountingLink
    await reaper._sweep(PARTITIONS)


async def create_groups(link: Link) -> None:
    sink = TracesSink(link, "agx", None, None, 60.0)  # type: ignore[arg-type] # it exports nothing
    assert await sink._create_groups(QUEUES) == []


@pytest.mark.parametrize(
    "look",
    [
        reap,
        create_groups,
        lambda link: read_states(link, dict.fromkeys(QUEUES, "0-0")),
        lambda link: count_live(link, "agx", PARTITIONS),
        lambda link: count_jobs(link, "agx", PARTITIONS),
    ],
    ids=["reaper", "missing queues", "queues", "live runs", "jobs"],
)
async def test_a_look_at_all_partitions_is_one_command(
    link: CountingLink, look: Callable[[Link], Awaitable[object]]
) -> None:
    await look(link)
    assert link.sent == 1


def runs_of(otlp: OtlpReceiver) -> int:
    return len({span.attributes["agx.run.id"] for span in otlp.spans})


def test_a_queue_that_is_no_stream_does_not_hide_the_others(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    facts: list[Fact] = [started(f"run-{n}", scope=f"scope-{n}") for n in range(12)]
    facts += [ended(f"run-{n}", scope=f"scope-{n}") for n in range(12)]
    wrong = queue.key(facts[0])
    others = [fact for fact in facts if queue.key(fact) != wrong]
    queue.redis.set(wrong, "text", ex=600)
    replica = start_replica(OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http)
    queue.add(*others)
    wait_until_sync(lambda: replica.scrape().total("agx_facts_total") == len(others))
    wait_until_sync(lambda: runs_of(otlp) == len(others) // 2)
    assert f"refused to read {wrong}" in replica.log
    queue.redis.delete(wrong)
    queue.add(*(fact for fact in facts if queue.key(fact) == wrong))
    wait_until_sync(lambda: replica.scrape().total("agx_facts_total") == len(facts))
    wait_until_sync(lambda: runs_of(otlp) == len(facts) // 2)
    assert replica.end() == 0


async def test_facts_of_a_queue_that_is_gone_are_acknowledged(queue: Queue, link: Link) -> None:
    queue.redis.set(QUEUES[0], "text", ex=600)
    sink = TracesSink(link, "agx", None, None, 60.0)  # type: ignore[arg-type] # it exports nothing
    await asyncio.wait_for(sink._acknowledge([Item(QUEUES[0], "1-1", "run-1:end", 1, ())]), 5)


def test_a_queue_that_stops_being_a_stream_does_not_hide_the_others(
    queue: Queue, start_replica: StartReplica, otlp: OtlpReceiver
) -> None:
    replica = start_replica(OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http)
    before = [ended(f"run-{n}", scope=f"scope-{n}") for n in range(12)]
    queue.add(*before)
    wait_until_sync(lambda: runs_of(otlp) == len(before))
    wrong = queue.key(before[0])
    queue.redis.delete(wrong)
    queue.redis.set(wrong, "text", ex=600)
    after = [ended(f"next-{n}", scope=f"scope-{n}") for n in range(12)]
    after = [fact for fact in after if queue.key(fact) != wrong]
    queue.add(*after)
    wait_until_sync(lambda: replica.scrape().total("agx_facts_total") == len(before) + len(after))
    wait_until_sync(lambda: runs_of(otlp) == len(before) + len(after))
    assert replica.end() == 0


async def test_of_a_queue_that_is_gone_nothing_waits(link: CountingLink, redis_url: str) -> None:
    sink, fold = make_sink(link)
    async with Redis.from_url(redis_url) as redis:
        await redis.xadd(QUEUES[0], {FIELD: encode(started("run"))})
        await redis.expire(QUEUES[0], 60)
        await redis.xgroup_create(QUEUES[0], TRACES_GROUP, "0")
        await sink._measure(fold)
        assert {sink_name: backlog.length for (_, sink_name), backlog in sink._backlogs.items()} == {
            "metrics": 1,
            "traces": 1,
        }
        await redis.delete(QUEUES[0])
    await sink._measure(fold)
    assert set(sink._backlogs.values()) == {Backlog()}


async def test_a_queue_that_is_no_stream_is_not_read_while_the_states_are(
    link: CountingLink, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, fold = make_sink(link)
    unreadable: list[set[int]] = []

    async def look(link: Link, read: Mapping[str, str]) -> dict[str, QueueState | ResponseError | None]:
        unreadable.append(set(sink._unreadable))
        return await read_states(link, read)

    monkeypatch.setattr("agx_sidecar.metrics.sink.read_states", look)
    async with Redis.from_url(redis_url) as redis:
        await redis.set(QUEUES[0], "no stream", ex=60)
        await sink._measure(fold)
        await sink._measure(fold)
        await redis.delete(QUEUES[0])
    assert unreadable == [set(), {0}]
    await sink._measure(fold)
    assert not sink._unreadable


async def test_no_state_is_written_while_a_queue_is_read_again(
    link: CountingLink, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, fold = make_sink(link)
    written: list[str] = []

    async def write(body: bytes) -> None:
        written.append(fold.positions[0].last_id)

    monkeypatch.setattr(type(sink._lease), "held", True)
    monkeypatch.setattr(sink._guard, "write", write)
    write_state = sink._writer(fold)
    async with Redis.from_url(redis_url) as redis:
        for entry_id in ("5-0", "6-0"):
            await redis.xadd(QUEUES[0], {FIELD: encode(started(entry_id))}, id=entry_id)
        await redis.expire(QUEUES[0], 60)
        fold.positions[0].last_id = "9-0"  # of an entry that only the former primary had
        await sink._measure(fold)
        assert sink._read_again == {0: "6-0"}
        await write_state()
        assert not written
        reading = asyncio.create_task(sink._read(fold, range(1), CatchUp({})))
        await wait_until(lambda: not sink._read_again)
        await write_state()
        assert written == ["6-0"]
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        sink._read_again[0] = "7-0"
        await redis.delete(QUEUES[0])
        await sink._measure(fold)
        assert not sink._read_again


def make_sink(link: Link) -> tuple[MetricsSink, Fold]:
    """Return a sink of one partition that leads, and its fold."""
    sink = MetricsSink(link, "agx", 5.0, Series())
    sink._partitions = 1
    sink._state.traces_trims[0] = TracesTrims()
    return sink, Fold(Series(), Series(), {0: Position()})


async def test_waiting_calls_are_counted_beside_odd_keys_and_fields(link: CountingLink, redis_url: str) -> None:
    no_hash, odd_fields = (keys.approvals("agx", n) for n in range(2))
    async with Redis.from_url(redis_url) as redis:
        await redis.set(no_hash, "no hash", ex=60)
        await redis.hset(odd_fields, mapping={"c:acme:1:s:call": "{}", "": "", "c": "", "d": "", "other": ""})
        await redis.expire(odd_fields, 60)
        assert await count_approvals(link, "agx", 2) == {"acme": 1}
        await redis.delete(no_hash, odd_fields)
