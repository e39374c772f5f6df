"""One leader among real processes on a real server: elected, killed, paused, drained; counters exact throughout."""

from __future__ import annotations

import asyncio
import os
import signal

import redis as redis_py
from support.made_facts import ended, heartbeat, node, started, tool
from support.proxy import Proxy
from support.replica import Queue, Replica, Scrape, StartReplica
from support.waiting import wait_until, wait_until_sync

from agx.embedded.server import EmbeddedServer
from agx.facts.schema import Fact
from agx.redis import keys


def a_run(run_id: str, scope: str) -> list[Fact]:
    return [
        started(run_id, scope=scope),
        node(run_id, scope=scope),
        tool(run_id, scope=scope),
        ended(run_id, scope=scope),
    ]


def some_runs(name: str, count: int) -> list[Fact]:
    """Runs of several scopes, so that all partitions have some."""
    return [fact for n in range(count) for fact in a_run(f"{name}-{n}", f"scope-{n % 7}")]


def wait_for_leader(*replicas: Replica) -> Replica:
    return wait_until_sync(lambda: next((replica for replica in replicas if replica.leads()), None), what="a leader")


def wait_for_runs(replica: Replica, count: int) -> Scrape:
    def scrape() -> Scrape | None:
        seen = replica.scrape()
        assert seen.total("agx_runs_total") == count, replica.log
        return seen

    return wait_until_sync(scrape, what=f"{count} runs")


def test_two_replicas_have_one_leader_and_only_it_shows_the_fleet(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(*some_runs("a", 20))
    both = [start_replica(), start_replica()]
    leader = wait_for_leader(*both)
    standby = next(replica for replica in both if replica is not leader)
    seen = wait_for_runs(leader, 20)
    assert seen.total("agx_runs_started_total") == 20
    assert seen.total("agx_tool_calls_total", outcome="ok") == 20
    assert seen.total("agx_facts_total", kind="run.end") == 20
    other = standby.scrape()
    assert other.get("agx_sidecar_leader") == 0
    assert other.fleet() == {}
    assert other.get("agx_redis_up") == 1
    assert not [name for name, _ in other.values if name.startswith(("agx_runs_", "gen_ai_", "agx_queue_"))]


def test_a_killed_leader_is_followed_by_one_that_shows_the_same(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(*some_runs("a", 30))
    both = [start_replica(), start_replica()]
    leader = wait_for_leader(*both)
    standby = next(replica for replica in both if replica is not leader)
    before = wait_for_runs(leader, 30).fleet()
    queue.add(*some_runs("a", 30))  # every one a repeat
    leader.end(signal.SIGKILL)
    wait_for_leader(standby)
    after = standby.scrape().fleet()
    assert {key: value for key, value in after.items() if key[0] != "agx_queue_trimmed_total"} == {
        key: value for key, value in before.items() if key[0] != "agx_queue_trimmed_total"
    }
    queue.add(*some_runs("b", 5))
    wait_for_runs(standby, 35)


def test_repeats_of_what_a_killed_leader_counted_are_known_to_its_successor(
    queue: Queue, start_replica: StartReplica
) -> None:
    queue.add(*some_runs("a", 10))
    first = start_replica()
    wait_for_runs(wait_for_leader(first), 10)
    wait_until_sync(lambda: queue.redis.strlen(keys.metrics("agx")) > 200, what="a written state")
    first.end(signal.SIGKILL)
    second = start_replica()
    wait_for_leader(second)
    queue.add(*some_runs("a", 10), *some_runs("b", 1))
    wait_for_runs(second, 11)


def test_a_leader_that_was_paused_shows_and_writes_nothing_when_it_wakes_up(
    queue: Queue, start_replica: StartReplica
) -> None:
    queue.add(*some_runs("a", 10))
    first = start_replica()
    wait_for_runs(wait_for_leader(first), 10)
    os.kill(first.child.pid, signal.SIGSTOP)
    second = start_replica()
    wait_for_leader(second)
    queue.add(*some_runs("b", 10))
    wait_for_runs(second, 20)
    owner = queue.redis.get(keys.leader("agx"))
    os.kill(first.child.pid, signal.SIGCONT)
    assert first.scrape().fleet() == {}
    wait_until_sync(lambda: "no longer the leader" in first.log, what="the woken leader's resignation")
    assert queue.redis.get(keys.leader("agx")) == owner
    queue.add(*some_runs("c", 10))
    wait_for_runs(second, 30)
    assert first.scrape().fleet() == {}
    # It stands by again, and leads from the other's state when that one goes.
    second.end(signal.SIGKILL)
    wait_for_leader(first)
    wait_for_runs(first, 30)


async def test_a_leader_that_is_cut_off_shows_and_writes_nothing_from_then_on(
    queue: Queue, server: EmbeddedServer, start_sidecar: StartReplica
) -> None:
    """Its network passes nothing on, for longer than its lease, and then all at once."""
    queue.add(*some_runs("a", 10))
    async with Proxy(server.port) as proxy:
        first = start_sidecar(proxy.url)
        await asyncio.to_thread(wait_for_runs, await asyncio.to_thread(wait_for_leader, first), 10)
        proxy.freeze()
        second = start_sidecar(server.url)
        await asyncio.to_thread(wait_for_leader, second)
        assert (await asyncio.to_thread(first.scrape)).fleet() == {}
        queue.add(*some_runs("b", 10))
        await asyncio.to_thread(wait_for_runs, second, 20)
        proxy.thaw()
        await wait_until(lambda: "no longer the leader" in first.log)
        queue.add(*some_runs("c", 10))
        await asyncio.to_thread(wait_for_runs, second, 30)
        assert (await asyncio.to_thread(first.scrape)).fleet() == {}
        second.end(signal.SIGKILL)
        await asyncio.to_thread(wait_for_leader, first)
        await asyncio.to_thread(wait_for_runs, first, 30)


def test_sigterm_writes_the_state_and_gives_the_lease_up(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(*some_runs("a", 10))
    first = start_replica(AGX_LEADER_LEASE="60")
    wait_for_runs(wait_for_leader(first), 10)
    assert first.end() == 0, first.log
    assert not queue.redis.exists(keys.leader("agx"))
    queue.redis.delete(*(keys.queue("agx", n) for n in range(queue.partitions)))
    second = start_replica(AGX_LEADER_LEASE="60")
    wait_for_runs(wait_for_leader(second), 10)


def test_trims_of_unread_facts_are_counted(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(*some_runs("a", 100))
    lost = 0
    for n in range(queue.partitions):
        length = queue.redis.xlen(keys.queue("agx", n))
        queue.redis.xtrim(keys.queue("agx", n), maxlen=5, approximate=False)
        lost += max(0, length - 5)
    leader = wait_for_leader(start_replica())
    wait_until_sync(lambda: leader.scrape().total("agx_queue_trimmed_total", sink="metrics") == lost)
    # What is trimmed after it was read is not lost.
    queue.add(*some_runs("b", 20))
    wait_until_sync(lambda: leader.scrape().total("agx_runs_started_total") >= 20)
    for n in range(queue.partitions):
        queue.redis.xtrim(keys.queue("agx", n), maxlen=1, approximate=False)
    queue.add(*some_runs("c", 7))
    measured = wait_until_sync(lambda: leader.scrape().total("agx_queue_length", sink="metrics") == 0)
    assert measured
    assert leader.scrape().total("agx_queue_trimmed_total", sink="metrics") == lost


def test_when_redis_loses_everything_the_leader_keeps_its_counts(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(*some_runs("a", 25))
    both = [start_replica(), start_replica()]
    leader = wait_for_leader(*both)
    wait_for_runs(leader, 25)
    queue.redis.flushall()
    again = Queue(queue.redis)
    again.add(*some_runs("a", 25), *some_runs("b", 3))  # the services' repeats, and news
    wait_for_runs(leader, 28)
    wait_until_sync(lambda: queue.redis.strlen(keys.metrics("agx")) > 200, what="a written state")
    assert sum(replica.leads() for replica in both) == 1


def test_an_unreadable_state_is_kept_aside_and_counting_starts_afresh(
    queue: Queue, start_replica: StartReplica
) -> None:
    queue.redis.set(keys.metrics("agx"), b"not a state of ours", ex=600)
    queue.add(*some_runs("a", 3))
    leader = wait_for_leader(start_replica())
    wait_for_runs(leader, 3)
    assert "can't be read" in leader.log
    assert queue.redis.get(keys.metrics("agx") + ":unreadable") == b"not a state of ours"


def test_a_newer_state_is_left_alone(queue: Queue, start_replica: StartReplica) -> None:
    newer = b"agx-state 0002 %016d %s\nwhatever comes" % (7, b"f" * 32)
    queue.redis.set(keys.metrics("agx"), newer, ex=600)
    replica = start_replica()
    wait_until_sync(lambda: "the metric state is newer" in replica.log)
    assert replica.scrape().fleet() == {}
    wait_until_sync(lambda: not queue.redis.exists(keys.leader("agx")), what="the lease given up")
    assert queue.redis.get(keys.metrics("agx")) == newer
    assert replica.get("/readyz")[0] == 200


def test_malformed_facts_are_counted_once_and_passed_over(queue: Queue, start_replica: StartReplica) -> None:
    queue.add_raw((keys.queue("agx", n), b"{broken") for n in range(queue.partitions))
    queue.add(*some_runs("a", 4))
    queue.redis.xadd(keys.queue("agx", 0), {"another": "field"})
    leader = wait_for_leader(start_replica())
    wait_for_runs(leader, 4)
    wait_until_sync(lambda: leader.scrape().get("agx_facts_malformed_total") == queue.partitions + 1)


def test_gauges_tell_live_runs_and_services(queue: Queue, start_replica: StartReplica) -> None:
    server_ms = int(queue.redis.time()[0]) * 1000
    leases = {
        keys.SessionKeys.of("agx", "acme", "u", f"s{n}").lease_member(f"run-{n}"): server_ms + 60_000 for n in range(3)
    }
    leases[keys.SessionKeys.of("agx", "acme", "u", "dead").lease_member("run-x")] = server_ms - 60_000
    key = keys.leases("agx", keys.partition("acme", queue.partitions))
    queue.redis.zadd(key, leases)
    queue.redis.expire(key, 600)
    queue.add(started(scope="idle"), heartbeat())
    leader = wait_for_leader(start_replica())
    wait_until_sync(lambda: leader.scrape().get("agx_runs_live", scope="acme") == 3)
    seen = wait_until_sync(lambda: s if (s := leader.scrape()).get("agx_listeners", service="shop") else None)
    assert seen.get("agx_runs_live", scope="idle") == 0
    assert seen.get("agx_listeners", service="shop") == 3
    assert seen.get("agx_append_buffer_events", service="shop") == 5
    assert seen.get("agx_run_silence_seconds", service="shop") == 1.5


def test_without_a_meta_it_waits_and_is_ready(redis_url: str, start_replica: StartReplica) -> None:
    replica = start_replica()
    wait_until_sync(lambda: "waiting for the first run" in replica.log)
    wait_until_sync(lambda: replica.get("/readyz")[0] == 200)
    with redis_py.Redis.from_url(redis_url) as client:
        Queue(client).add(*some_runs("a", 2))
    wait_for_runs(wait_for_leader(replica), 2)


def test_more_partitions_are_followed_without_a_restart(queue: Queue, start_replica: StartReplica) -> None:
    queue.add(*some_runs("a", 10))
    leader = wait_for_leader(start_replica())
    wait_for_runs(leader, 10)
    wider = Queue(queue.redis, partitions=9)
    wider.add(*some_runs("b", 10))
    wait_until_sync(lambda: "9 partitions" in leader.log)
    wait_for_leader(leader)
    wait_for_runs(leader, 20)


def test_an_outage_of_redis_is_reported_once_and_survived(queue: Queue, start_replica: StartReplica) -> None:
    assert isinstance(queue.redis, redis_py.Redis)
    queue.add(*some_runs("a", 5))
    leader = wait_for_leader(start_replica())
    wait_for_runs(leader, 5)
    for _ in range(3):
        queue.redis.client_kill_filter(_type="normal", skipme=True)
    queue.add(*some_runs("b", 5))
    wait_for_runs(leader, 10)
    assert leader.log.count("Traceback") == 0
