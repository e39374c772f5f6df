"""How a worker finds dead runs and waiting jobs, and what that costs; dead runs are written by hand."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.durable_worker import make_recipe
from support.recorded import read_recorded
from support.waiting import wait_until
from support.workers import make_recipe as make_quick_recipe
from support.workers import working

import agx
from agx.checkpoints.codec import FORMAT
from agx.checkpoints.job import Job
from agx.engine.engine import Engine
from agx.engine.lease import Lease
from agx.engine.registry import current_engine
from agx.facts.schema import RunEnded
from agx.jobs import worker as worker_module
from agx.jobs.dead_runs import DeadRuns
from agx.jobs.queue import JobQueue
from agx.jobs.takeover import open_taken_over
from agx.recovery.dead_run import DeadRun, read_dead_run
from agx.redis import keys
from agx.redis.bus import Bus, Script
from agx.redis.live_key import new_holder, parse_live
from agx.runs.outcome import Ending
from agx.stream import append_scripts

BIG = "x" * 100_000


@contextmanager
def counted(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the commands and scripts of a bus, and the bytes of their replies as `bytes`."""
    count: Counter[str] = Counter()

    def counting(issue: Any, name: Any) -> Any:
        def call(*args: Any) -> asyncio.Future[Any]:
            count[name(args)] += 1
            reply: asyncio.Future[Any] = issue(*args)
            reply.add_done_callback(lambda done: count.update({"bytes": len(repr(done.result()))}))
            return reply

        return call

    with monkeypatch.context() as patch:
        patch.setattr(bus, "execute", counting(bus.execute, lambda args: args[0]))
        patch.setattr(bus, "run", counting(bus.run, lambda args: "script"))
        yield count


async def die(client: Redis, name: str, *entries: dict[str, Any], agent: str = "support", deadline: int = 1) -> None:
    """Write what the process of a run leaves."""
    session = keys.SessionKeys.of("agx", "acme", "ada", name)
    job = Job(name, "acme", "ada", name, agent, BIG, max_attempts=3)
    begin = {"run_id": name, "agent": agent, "seq": 0, "recover": 60, "max_attempts": 3}
    first: dict[Any, Any] = {"type": "begin", "origin": "opale", "body": orjson.dumps(begin), "ck": job.encode()}
    await client.xadd(session.stream, first)
    for seq, entry in enumerate(entries, 1):
        body = {"seq": seq, "fill": BIG, **{name: value for name, value in entry.items() if name != "ck"}}
        fields: dict[Any, Any] = {"type": entry["type"], "origin": "opale", "body": orjson.dumps(body)}
        await client.xadd(session.stream, fields | ({"ck": entry["ck"]} if "ck" in entry else {}))
    await client.expire(session.stream, 60)
    leases = keys.leases("agx", keys.partition("acme", current_engine().queues.partitions or 1))
    await client.zadd(leases, {session.lease_member(name): deadline})
    await client.expire(leases, 60)


async def ready() -> Engine:
    engine = current_engine()
    await engine.ready()
    engine.clock.at_least(int(time.time() * 1_000))
    return engine


async def find(dead_runs: DeadRuns) -> list[str]:
    return [dead.run_id async for dead in dead_runs.find()]


RESUME = {"type": "resume", "run_id": "alone"}
HANDED_OVER = -(10**13)  # the deadline, in ms: after the last entry


async def test_a_run_that_is_left_alone_is_not_read_again(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await ready()
    await die(configured, "others", *[{"type": "info"}] * 5, agent="other")
    await die(configured, "exhausted", RESUME, RESUME)
    await die(configured, "newer", {"type": "info", "ck": orjson.dumps({"v": FORMAT + 1})})
    await die(configured, "ended", {"type": "end"})
    await die(configured, "alone", RESUME)
    empty = False
    dead_runs = DeadRuns(engine, {"support"}, known=(), takes=lambda alone: empty or not alone)
    with counted(engine.control, monkeypatch) as first:
        assert await find(dead_runs) == []
    assert dead_runs.waiting == {"alone"}
    assert first["XRANGE"] == 9  # of the other agent's run only the first entry
    with counted(engine.control, monkeypatch) as again:
        assert await find(dead_runs) == []
    assert dead_runs.waiting == {"alone"}
    assert dict(again) == {"ZRANGEBYSCORE": engine.queues.partitions, "bytes": again["bytes"]}
    assert again["bytes"] < 1_000
    empty = True
    assert await find(dead_runs) == ["alone"]
    assert dead_runs.waiting == set()


async def test_a_worker_without_room_reads_no_stream(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await ready()
    await die(configured, "r")
    dead_runs = DeadRuns(engine, {"support"}, known=(), takes=lambda alone: False)
    with counted(engine.control, monkeypatch) as count:
        assert await find(dead_runs) == []
    assert "XRANGE" not in count


async def test_a_run_that_dies_again_is_read_again(configured: Redis) -> None:
    engine = await ready()
    await die(configured, "r", {"type": "end"})
    dead_runs = DeadRuns(engine, {"support"}, known=(), takes=lambda alone: True)
    assert await find(dead_runs) == []
    await configured.delete("agx:acme:ada:r")
    await die(configured, "r", deadline=2)
    assert await find(dead_runs) == ["r"]


async def test_runs_that_only_others_can_resume_hide_none(configured: Redis) -> None:
    engine = await ready()
    leases = keys.leases("agx", keys.partition("acme", engine.queues.partitions or 1))
    await configured.zadd(leases, {f"acme:ada:s{n}:r{n}": 1 for n in range(150)})
    await die(configured, "r", deadline=2)
    dead_runs = DeadRuns(engine, {"support"}, known=(), takes=lambda alone: True)
    assert [*await find(dead_runs), *await find(dead_runs)] == ["r"]


async def test_a_run_that_is_open_in_this_process_is_not_taken_over(configured: Redis) -> None:
    """Its lease may have expired while the process stalled: then it takes it again."""
    engine = await ready()
    await die(configured, "r")
    dead_runs = DeadRuns(engine, {"support"}, known=(), takes=lambda alone: True)
    engine.sessions["agx:acme:ada:r"] = object()  # type: ignore[assignment]
    assert await find(dead_runs) == []
    engine.sessions.clear()
    assert await find(dead_runs) == ["r"]


async def take_over(engine: Engine) -> DeadRun:
    """Take the dead run over, and end it."""
    (dead,) = [dead async for dead in DeadRuns(engine, {"support"}, known=(), takes=lambda alone: True).find()]
    life = await open_taken_over(engine, dead, "support", None)
    assert life is not None
    await life.close(Ending("failed"))
    return dead


@pytest.mark.parametrize(
    ("deadline", "said"),
    [(HANDED_OVER, True), (1, None), (-1, None)],
    ids=["handed over", "died", "handed over once, and died later"],
)
async def test_the_successor_records_a_hand_over(configured: Redis, deadline: int, said: bool | None) -> None:
    engine = await ready()
    await die(configured, "r", deadline=deadline)
    assert (await take_over(engine)).record.failed_attempts == (0 if said else 1)
    events = [event async for event in agx.listen("acme", "ada", "r", serialize=False)]
    (resume,) = [event["body"] for event in events if event["type"] == "resume"]
    assert resume.get("handed_over") is said


async def test_the_successor_s_log_names_the_run(configured: Redis, caplog: pytest.LogCaptureFixture) -> None:
    engine = await ready()
    await die(configured, "r")
    with caplog.at_level("INFO", "agx"):
        await take_over(engine)
    assert "agx: run r continues here, attempt 2" in caplog.messages


async def test_one_worker_at_a_time_makes_room_for_a_run_that_has_to_run_alone(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one goes on with jobs; the run starts as soon as the first one is empty."""
    monkeypatch.setattr(worker_module, "_SWEEP", 0.05)
    engine = await ready()
    proceed, under_way, begun = asyncio.Event(), set[str](), list[str]()

    async def wait(job: agx.Job) -> None:
        begun.append(job.session_id)
        under_way.add(job.session_id)
        if job.session_id != "alone":
            await proceed.wait()
        elif len(under_way) > 1:
            raise AssertionError(f"it runs beside {under_way}")
        under_way.discard(job.session_id)

    recipe = make_quick_recipe(wait)
    workers = [agx.Worker({"support": recipe, name: recipe}) for name in "ab"]
    async with working(*workers):
        for name in "ab":
            await agx.submit("acme", "ada", name, agent=name, prompt="Hello")
        await wait_until(lambda: len(begun) == 2)
        await die(configured, "alone", RESUME)
        with counted(engine.control, monkeypatch) as count:
            await wait_until(lambda: count["SET"] >= 3)  # the second one is refused, and tries again
        await agx.submit("acme", "ada", "next", agent="support", prompt="Hello")
        await wait_until(lambda: "next" in begun)
        assert [worker._makes_room for worker in workers].count(True) == 1
        assert "alone" not in begun
        proceed.set()
        await wait_until(lambda: "alone" in begun)
        events = [event async for event in agx.listen("acme", "ada", "alone", serialize=False, wait=10)]
        await wait_until(lambda: not any(worker._makes_room for worker in workers))
    assert events[-1]["body"]["outcome"] == "completed"
    assert not await configured.exists(keys.room(engine.config.key_prefix))


UNREADABLE_ERROR = "agx.checkpoints.codec.UnreadableCheckpointError"
UNREADABLE = [b'{"v":1,"messages":5}', b'{"v":1,"start":3,"messages":[]}', b'{"v":1,"stored":"7:00"}', b"[]"]


@pytest.mark.parametrize("checkpoint", UNREADABLE, ids=["not messages", "one before is missing", "stored", "no object"])
async def test_a_run_with_an_unreadable_checkpoint_is_lost_and_the_reason_is_recorded(
    configured: Redis, caplog: pytest.LogCaptureFixture, checkpoint: bytes
) -> None:
    await ready()
    await die(configured, "r", {"type": "info", "ck": checkpoint})
    worker = agx.Worker({"support": make_local_recipe()})
    running = asyncio.create_task(worker.recover())
    events = [event async for event in agx.listen("acme", "ada", "r", serialize=False, wait=10)]
    worker.stop()
    await running
    error, end = events[-2:]
    assert (end["body"]["outcome"], error["body"]["error_type"]) == ("lost", UNREADABLE_ERROR)
    assert any("run r can't be resumed and is lost" in message for message in caplog.messages)
    ended = (await read_recorded(configured, "agx:acme:ada:r")).one(RunEnded)
    assert (ended.outcome, ended.error_type) == ("lost", UNREADABLE_ERROR)


def make_local_recipe() -> Any:
    agent = Agent(TestModel(), name="support", deps_type=ScopeDeps)

    async def recipe(job: agx.Job) -> agx.Call:
        return agx.Call(FakeSession(), agent, ScopeDeps(scope="acme", user_id="ada", session_id=job.session_id))

    return recipe


async def test_two_attempts_of_a_run_in_one_process_have_a_lease_each(configured: Redis) -> None:
    """The first one's process stalled; what becomes of its lease leaves the second one's alone."""
    engine = await ready()
    session = keys.SessionKeys.of("agx", "acme", "ada", "s")
    lost: list[int] = []
    first, second = (
        Lease(session, "r", lambda *_: None, lambda n=n: lost.append(n), new_holder("r", n))  # type: ignore[misc]
        for n in (1, 2)
    )
    await engine.leases.acquire(first)
    await configured.delete(session.live)
    assert await engine.leases.take_over(second)
    await engine.leases.abandon(first)
    await engine.leases.ensure(second)  # it is still renewed
    assert parse_live(await configured.get(session.live)).holder == second.holder
    await engine.leases.release(second)
    assert not lost


async def test_a_cancel_is_kept_through_a_hand_over_as_long_as_the_run_can_be_resumed(configured: Redis) -> None:
    engine = await ready()
    session = keys.SessionKeys.of("agx", "acme", "ada", "s")
    lease = Lease(session, "r", lambda *_: None, lambda: None, new_holder("r", 1), recover=600)
    await engine.leases.acquire(lease)
    assert await agx.cancel("acme", "ada", "s")
    await engine.leases.hand_over(lease)
    assert parse_live(await configured.get(session.live)).is_gap_mark
    assert await configured.pttl(session.live) > 590_000


async def test_a_hand_over_wakes_the_workers(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SWEEP", 3_600)
    engine = await ready()
    await die(configured, "r", deadline=HANDED_OVER)
    lease = Lease(keys.SessionKeys.of("agx", "acme", "ada", "r"), "r", lambda *_: None, lambda: None, recover=60)
    assert await engine.leases.take_over(lease)
    agent = Agent(TestModel(custom_output_text="Hi"), name="support", deps_type=ScopeDeps)
    worker = agx.Worker({"support": make_recipe(agent)})
    working = asyncio.create_task(worker.run())
    try:
        await wait_until(lambda: _count_subscribers(configured))
        await engine.leases.hand_over(lease)
        events = [event async for event in agx.listen("acme", "ada", "r", serialize=False)]
    finally:
        worker.stop()
        await working
    assert events[-1]["body"]["outcome"] == "completed"


async def _count_subscribers(client: Redis) -> int:
    ((_, count),) = await client.pubsub_numsub(keys.jobs_wake_channel("agx"))
    return int(count)


# --- waiting jobs ---


async def test_waiting_jobs_are_listed_without_what_they_hold(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(250):
        await agx.submit("acme", "ada", f"s{n}", agent="support", prompt=BIG[:20_000])
    engine = current_engine()
    partition = keys.partition("acme", engine.queues.partitions or 1)
    queue = JobQueue(engine.control, "agx", engine.queues.partitions or 1, worker="w", claim_ttl=10)
    with counted(engine.control, monkeypatch) as count:
        listed = await queue.waiting(partition)
    assert [(len(listed), job.scope, job.agent) for job in listed[:1]] == [(250, "acme", "support")]
    assert (count["script"], count["bytes"] < 30_000) == (1, True)
    with counted(engine.control, monkeypatch) as again:
        assert await queue.waiting(partition) is listed
    assert (again["script"], again["bytes"] < 100) == (1, True)
    job = await queue.read(listed[3])
    assert job is not None
    assert (job.session_id, job.prompt) == ("s3", BIG[:20_000])
    await queue.claim(listed[3])
    await queue.remove(listed[3])
    assert await queue.read(listed[3]) is None
    assert len(await queue.waiting(partition)) == 249


async def test_a_stream_of_another_type_hides_no_dead_run(configured: Redis) -> None:
    await ready()
    await die(configured, "odd", deadline=1)
    await die(configured, "good", deadline=2)
    await configured.set(keys.SessionKeys.of("agx", "acme", "ada", "odd").stream, "x", ex=60)
    assert await find(DeadRuns(await ready(), {"support"}, known=(), takes=lambda alone: True)) == ["good"]


async def test_a_run_that_ended_is_not_resumed_although_an_event_was_added_behind_its_end(configured: Redis) -> None:
    await ready()
    await die(configured, "ended", {"type": "end"}, {"type": "info"})
    assert await find(DeadRuns(await ready(), {"support"}, known=(), takes=lambda alone: True)) == []


async def test_a_takeover_that_is_cancelled_after_its_resume_leaves_no_open_stream(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await ready()
    await die(configured, "r")
    (dead,) = [dead async for dead in DeadRuns(engine, {"support"}, known=(), takes=lambda alone: True).find()]
    run = engine.write_side.bus.run

    def run_and_cancel(script: Script, *args: Any) -> asyncio.Future[Any]:
        if script is append_scripts.RESUME:
            asyncio.get_running_loop().call_soon(taking_over.cancel)
        return run(script, *args)

    monkeypatch.setattr(engine.write_side.bus, "run", run_and_cancel)
    taking_over = asyncio.create_task(open_taken_over(engine, dead, "support", None))
    await asyncio.wait({taking_over})
    assert taking_over.cancelled()
    assert [entry[1][b"type"] for entry in await configured.xrevrange("agx:acme:ada:r", count=1)] == [b"resume"]
    assert not engine.write_side.streams.writers


async def test_dead_runs_are_read_at_the_same_time(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a worker that dies with many runs keeps the last of them waiting for the round trips of all."""
    engine = await ready()
    for n in range(8):
        await die(configured, f"s{n}")
    reading, all_read = 0, asyncio.Event()

    async def read(*args: Any, **named: Any) -> DeadRun | None:
        nonlocal reading
        reading += 1
        if reading == 8:
            all_read.set()
        await all_read.wait()
        return await read_dead_run(*args, **named)

    monkeypatch.setattr("agx.jobs.dead_runs.read_dead_run", read)
    async with asyncio.timeout(10):
        found = await find(DeadRuns(engine, {"support"}, known=(), takes=lambda alone: True))
    assert sorted(found) == [f"s{n}" for n in range(8)]
