"""Between a process's death and the takeover a run that can be resumed counts as live; entries are written by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import ScopeDeps, scripted
from support.waiting import wait_until

import agx
from agx.checkpoints.job import Job
from agx.engine.engine import Engine
from agx.engine.lease import Lease
from agx.engine.registry import current_engine
from agx.jobs.takeover import open_taken_over
from agx.recovery.dead_run import DeadRun
from agx.recovery.recorded_run import RecordedRun
from agx.redis.keys import SessionKeys, leases, partition
from agx.redis.live_key import TAKE_OVER, gap_holder, new_holder, parse_live
from agx.testing import MemorySession

STREAM, LIVE = "agx:1:1:s", "agx:1:1:s:live"
LEASE = 0.9


@pytest.fixture
async def client(redis_url: str) -> Any:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE))
        yield client
        await agx.aclose()


async def leave_run(client: Redis, *, age: float = 0, silent: float = 0, **begin: Any) -> None:
    """Write the stream of a run whose process died `age` seconds ago, after `silent` seconds without an entry."""
    died_ms = int((time.time() - age) * 1_000)
    ms = died_ms - int(silent * 1_000)
    body = {"run_id": "r", "agent": "support", "seq": 0, **begin}
    entry: dict[Any, Any] = {"type": "begin", "origin": "opale", "body": orjson.dumps(body)}
    await client.xadd(STREAM, entry, id=f"{ms}-0")
    await client.expire(STREAM, 60)
    await client.zadd("agx:1:1", {"s": died_ms})
    await client.expire("agx:1:1", 60)


async def live_sessions() -> list[str]:
    return [str(session) async for _, _, session in agx.q(1, 1)]


def run() -> Any:
    return agx.run(MemorySession(id="s"), Agent(scripted(["hi"])), "hi", deps=ScopeDeps(session_id="s"))


async def test_it_is_live(client: Redis) -> None:
    await leave_run(client, recover=60, max_attempts=3)
    assert await agx.is_live(1, 1, "s")
    assert await live_sessions() == ["s"]


async def test_it_is_live_after_a_tool_that_worked_for_long(client: Redis) -> None:
    await leave_run(client, silent=300, recover=60)
    assert await agx.is_live(1, 1, "s")
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.SessionBusyError):
        await run()


async def test_a_renewal_is_a_sign_of_life_of_a_run_that_can_be_resumed(client: Redis) -> None:
    engine = current_engine()
    await engine.ready()
    session = SessionKeys.of("agx", 1, 1, "s")
    lease = Lease(session, "r", lambda *_: None, lambda: None, new_holder("r", 1), recover=60)
    await engine.leases.acquire(lease)
    await _renew(engine)  # the first one also writes what lasts a day
    await client.zadd(session.index, {"s": 1}, xx=True)
    await _renew(engine)
    assert (await client.zscore(session.index, "s") or 0) > 1
    await client.zrem(session.index, "s")
    await _renew(engine)
    assert await client.zscore(session.index, "s") is None  # so lost data is not taken for a cancel
    await engine.leases.release(lease)


async def _renew(engine: Engine) -> None:
    await engine.leases._renew_once()
    await engine.control.execute("PING")  # what the renewal sent without waiting has arrived


@pytest.mark.parametrize("handed_over", [True, False])
async def test_a_takeover_that_fails_leaves_the_deadline_as_it_was(client: Redis, handed_over: bool) -> None:
    """So a worker that died does not count as one that handed its run over."""
    engine = current_engine()
    await engine.ready()
    session = SessionKeys.of("agx", 1, 1, "s")
    deadline_ms = -5_000 if handed_over else 5_000
    job = Job("r", "support", "1", "1", "s", prompt="hi", recover=60)
    record = RecordedRun.of("r", [], deadline_ms=deadline_ms)
    dead = DeadRun(session, job, record, (1, 0), (), None, deadline_ms)
    key = leases("agx", partition("1", engine.queues.partitions or 1))
    await client.zadd(key, {session.lease_member("r"): deadline_ms})
    await client.expire(key, 60)
    assert await open_taken_over(engine, dead, "support", None) is None  # the stream has changed
    assert await client.zscore(key, session.lease_member("r")) == deadline_ms
    assert await client.get(LIVE) is None


async def test_no_second_run_begins_and_the_stream_stays(client: Redis) -> None:
    await leave_run(client, recover=60, max_attempts=3)
    before = await client.xrange(STREAM)
    for second in (run, lambda: agx.start(1, 1, "s"), lambda: agx.submit(1, 1, "s", agent="a", prompt="hi")):
        with pytest.raises(agx.SessionBusyError):
            await second()
    assert await client.xrange(STREAM) == before
    assert await client.get(LIVE) is None


@pytest.mark.parametrize(
    ("age", "begin"),
    [(0, {}), (12, {"recover": 10}), (0, {"recover": "60"}), (0, {"recover": True}), (0, {"recover": -5})],
)
async def test_a_run_that_nobody_can_resume_is_not_live(client: Redis, age: float, begin: dict[str, Any]) -> None:
    await leave_run(client, age=age, **begin)
    assert not await agx.is_live(1, 1, "s")
    assert not await agx.cancel(1, 1, "s")
    assert await live_sessions() == []


async def test_an_ended_run_is_not_live(client: Redis) -> None:
    await leave_run(client, recover=60)
    await client.xadd(STREAM, {"type": "end", "origin": "opale", "body": "{}"})
    assert not await agx.is_live(1, 1, "s")
    await run()


async def test_cancel_leaves_a_mark_that_the_next_process_takes_over(client: Redis) -> None:
    await leave_run(client, recover=60)
    assert await agx.cancel(1, 1, "s")
    value = parse_live(await client.get(LIVE))
    assert (value.is_gap_mark, value.holder) == (True, gap_holder("r"))
    assert 60_000 < await client.pttl(LIVE) <= 60_000 + LEASE * 1_000  # as long as a successor may come
    assert not await agx.is_live(1, 1, "s")  # as of any cancelled run
    assert await live_sessions() == ["s"]
    assert await agx.cancel(1, 1, "s")  # once more
    with pytest.raises(agx.SessionBusyError):
        await run()
    holder = new_holder("r", 2)
    for _ in range(2):  # the second one as after a lost reply
        assert (await current_engine().control.run(TAKE_OVER, LIVE, holder, 900, "r"))[0] == 1
        taken = parse_live(await client.get(LIVE))
        assert (taken.kind, taken.holder, taken.mark_ms) == ("cancelled", holder, value.mark_ms)


async def test_a_cancel_outlives_the_lease_of_a_process_that_has_just_died(client: Redis) -> None:
    await leave_run(client, recover=60)
    await client.set(LIVE, "r", px=300)
    assert await agx.cancel(1, 1, "s")
    assert parse_live(await client.get(LIVE)).is_gap_mark


async def test_a_cancel_marks_the_process_that_takes_the_run_over_before_the_gap_is_marked(client: Redis) -> None:
    await leave_run(client, recover=60)
    await client.set(LIVE, "r", px=60_000)
    cancelling = asyncio.create_task(agx.cancel(1, 1, "s"))
    await wait_until(lambda: _read_kind(client, "cancelled"))
    await client.set(LIVE, new_holder("r", 2), px=60_000)
    await wait_until(lambda: _read_kind(client, "cancelled"))
    assert not cancelling.done()
    await client.xadd(STREAM, {"type": "end", "origin": "opale", "body": "{}"})
    assert await cancelling


async def test_a_cancel_waits_no_longer_than_the_lease_for_a_process_that_does_not_stop(client: Redis) -> None:
    await leave_run(client, recover=60)
    await client.set(LIVE, "r", px=60_000)
    assert await agx.cancel(1, 1, "s")
    assert parse_live(await client.get(LIVE)).holder == "r"


async def _read_kind(client: Redis, kind: str) -> bool:
    raw = await client.get(LIVE)
    return raw is not None and parse_live(raw).kind == kind


async def test_listeners_wait_until_the_run_is_resumed(client: Redis) -> None:
    await leave_run(client, recover=60)
    engine = current_engine()
    following = asyncio.create_task(_listen())
    await wait_until(lambda: engine.hub.listeners)
    (feed,) = engine.hub._feeds.values()
    await wait_until(lambda: feed._dead_since is not None and feed._recover == 60)
    assert feed._dead_since is not None
    feed._dead_since -= 50  # longer than the hub waits for a run that nobody can resume
    feed.poll()
    await engine.control.execute("PING")
    assert not feed.dead
    await client.xadd(STREAM, {"type": "resume", "origin": "opale", "body": '{"run_id": "r", "attempt": 2}'})
    await client.xadd(STREAM, {"type": "end", "origin": "opale", "body": "{}"})
    assert [event["type"] for event in await following] == ["begin", "resume", "end"]


async def test_listeners_give_up_once_nobody_can_resume_it(client: Redis) -> None:
    await leave_run(client, recover=1)
    events = await _listen()
    assert [event["type"] for event in events] == ["begin", "error"]
    assert events[-1]["body"]["error_type"] == "lost"


async def _listen() -> list[dict[str, Any]]:
    return [event async for event in agx.listen(1, 1, "s", serialize=False, timeout=60)]
