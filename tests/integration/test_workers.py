"""Workers and their queue in one process: bad jobs, limits, turns of scopes, and what a stopped worker leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.recorded import read_recorded
from support.waiting import wait_until
from support.workers import make_recipe, working

import agx
from agx.checkpoints import job as job_format
from agx.engine.registry import current_engine
from agx.facts.decoding import decode
from agx.facts.schema import RunEnded, RunStarted
from agx.jobs import queue as job_queue
from agx.jobs.attempt import start_job
from agx.jobs.queue import JobQueue, Waiting
from agx.jobs.submit import open_queue
from agx.redis import keys
from agx.redis.keys import SessionKeys
from agx.redis.live_key import ACQUIRE, HAND_OVER, MARK_CANCELLED, TAKE_OVER, gap_holder, new_holder, parse_live
from agx_sidecar.link import Link
from agx_sidecar.metrics import gauges


async def submit(session: str = "s", *, scope: str = "acme", **options: Any) -> str:
    return await agx.submit(scope, "ada", session, **{"agent": "support", "prompt": "Hello"} | options)


async def follow(session: str = "s") -> list[dict[str, Any]]:
    return [event async for event in agx.listen("acme", "ada", session, serialize=False, wait=30)]


async def raise_secret(job: agx.Job) -> None:
    raise LookupError("secret")


async def raise_stray_cancellation(job: agx.Job) -> None:
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    await cancelled


@pytest.mark.parametrize(
    "recipe",
    [make_recipe(raise_secret), make_recipe(raise_stray_cancellation), make_recipe(user_id="bob")],
    ids=["it raises", "it raises a CancelledError", "other ids"],
)
async def test_a_bad_recipe_ends_the_run_as_failed(
    configured: Redis, recipe: Callable[[agx.Job], Awaitable[agx.Call]], caplog: pytest.LogCaptureFixture
) -> None:
    async with working(agx.Worker({"support": recipe})):
        await submit()
        events = await follow()
    assert [event["type"] for event in events] == ["begin", "error", "end"]
    assert events[1]["body"]["code"] == "run_failed"
    assert "secret" not in str(events)
    assert events[2]["body"]["outcome"] == "failed"
    assert any("recipe of agent support" in record.message and record.exc_info for record in caplog.records)


async def test_a_job_that_nobody_serves_waits_and_then_fails(configured: Redis) -> None:
    async with working(agx.Worker({"other": make_recipe()})):
        await submit(agent="nobody", recover=0.3)
        events = await follow()
        assert events[-2]["body"]["code"] == "agent_not_served"
        assert events[-1]["body"]["outcome"] == "failed"
        await submit("t", agent="nobody", recover=3_600)
        await submit("u", agent="other")
        await follow("u")
        assert not await configured.exists("agx:acme:ada:t")


async def test_a_run_id_that_is_submitted_twice_runs_once(configured: Redis) -> None:
    made: list[str] = []
    opened = asyncio.Event()

    async def note(job: agx.Job) -> None:
        made.append(job.run_id)
        await opened.wait()

    workers = [agx.Worker({"support": make_recipe(note)}, at_once=1) for _ in range(2)]
    async with working(*workers):
        for _ in range(2):
            await submit(run_id="one")
        await wait_until(lambda: made)  # the second job waits, as any other of this session
        opened.set()
        events = await follow()
        assert [event["type"] for event in events].count("begin") == 1
        assert events[-1]["body"]["outcome"] == "completed"
        await wait_until(lambda: _is_empty(configured))
    first, *_ = await configured.xrange("agx:acme:ada:s", count=1)
    assert first[0].decode() == events[0]["id"]  # it did not begin again


async def _is_empty(client: Redis) -> bool:
    return not any([await client.xlen(key) for key in await client.keys("agx::jobs:*")])


async def test_a_job_of_a_newer_version_is_left_to_newer_workers(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(job_format, "FORMAT", job_format.FORMAT + 1)
        await submit("newer")
    async with working(agx.Worker({"support": make_recipe()})):
        await submit("s")
        await follow()
    assert not await configured.exists("agx:acme:ada:newer")
    assert not await _is_empty(configured)


async def test_a_scope_has_only_so_many_waiting_jobs(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, max_waiting_jobs=2, queue_partitions=1))
        for n in range(2):
            await submit(f"s{n}")
        with pytest.raises(agx.QueueFullError, match="acme"):
            await submit("s2")
        await submit(scope="beta")
        await agx.aclose()


async def test_waiting_jobs_of_a_scope_are_counted_behind_those_of_others(configured: Redis) -> None:
    engine = current_engine()
    await engine.ready()
    queue = JobQueue(engine.control, "agx", 1, worker="-", claim_ttl=1)
    for n in range(205):
        scope = "beta" if n < 150 else "acme"
        job = agx.Job(f"r{n}", scope, "ada", f"s{n}", "support")
        assert await queue.submit(job, job.encode(), delay=0, max_waiting=200) == ""
    job = agx.Job("more", "acme", "ada", "more", "support")
    assert await queue.submit(job, job.encode(), delay=0, max_waiting=55) == "scope"
    assert await queue.submit(job, job.encode(), delay=0, max_waiting=56) == ""


async def test_a_job_is_accepted_as_soon_as_the_run_before_has_ended(configured: Redis) -> None:
    await configured.set("agx:acme:ada:s:live", "run-1", px=60_000)
    await configured.xadd("agx:acme:ada:s", {"type": "begin", "body": "{}"})
    with pytest.raises(agx.SessionBusyError):
        await submit()
    await configured.xadd("agx:acme:ada:s", {"type": "end", "body": "{}"})
    await configured.expire("agx:acme:ada:s", 60)
    assert await submit()


@pytest.mark.parametrize(("limit", "most"), [({"per_scope": 1}, 1), ({"per_agent": 2}, 2), ({}, 4)])
async def test_limits(configured: Redis, limit: dict[str, int], most: int) -> None:
    live = peak = done = 0

    async def count(job: agx.Job) -> None:
        nonlocal live, peak, done
        live += 1
        peak = max(peak, live)
        await asyncio.sleep(0.02)
        live -= 1
        done += 1

    for n in range(8):
        await submit(f"s{n}")
    async with working(agx.Worker({"support": make_recipe(count)}, at_once=4, **limit)):
        await wait_until(lambda: done == 8)
    assert peak == most


async def _start_all(client: Redis, *jobs: tuple[str, int]) -> list[str]:
    """Have a worker run jobs one at a time, and return their scopes in order; `jobs` has scopes and counts."""
    order: list[str] = []

    async def note(job: agx.Job) -> None:
        order.append(job.scope_id)

    for scope, count in jobs:
        for n in range(count):
            await submit(f"{len(jobs)}-{n}", scope=scope)
    async with working(agx.Worker({"support": make_recipe(note)}, at_once=1)):
        await wait_until(lambda: len(order) == sum(count for _, count in jobs))
        await wait_until(lambda: _is_empty(client))
    return order


async def test_a_scope_at_ten_times_the_load_at_most_doubles_the_wait_of_the_others(configured: Redis) -> None:
    others = ("beta", 3), ("gamma", 3)
    alone = await _start_all(configured, *others)
    beside = await _start_all(configured, ("acme", 30), *others)
    for scope, _ in others:
        early, late = ([n for n, one in enumerate(order, 1) if one == scope] for order in (alone, beside))
        assert all(wait <= 2 * before for before, wait in zip(early, late, strict=True))


async def test_jobs_of_one_scope_hide_no_other_s(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "WINDOW", 4)
    monkeypatch.setattr(keys, "partition", lambda scope, partitions: 0)
    order = await _start_all(configured, ("acme", 20), ("beta", 1))
    assert order.index("beta") <= 6


async def test_a_listing_of_many_jobs_keeps_the_order_within_a_session(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "WINDOW", 2)
    engine = current_engine()
    await engine.ready()
    queue = JobQueue(engine.control, "agx", 1, worker="-", claim_ttl=1)
    for n, session in enumerate("abcabd"):
        job = agx.Job(f"r{n}", "acme", "ada", session, "support")
        await queue.submit(job, job.encode(), delay=60 if session == "b" and n == 1 else 0, max_waiting=10)
    pages = [[job.session for job in await queue.waiting(0)] for _ in range(4)]
    # The first job of `a` has to begin before the second one; that of `b` is due later than the second one.
    assert pages == [["ada:a", "ada:b"], ["ada:c"], ["ada:b", "ada:d"], ["ada:a", "ada:b"]]


async def test_a_delayed_job_comes_when_it_is_due(configured: Redis) -> None:
    order: list[str] = []

    async def note(job: agx.Job) -> None:
        order.append(job.session_id)

    await submit("late", delay=0.5)
    await submit("now")
    async with working(agx.Worker({"support": make_recipe(note)}, at_once=1)):
        await wait_until(lambda: order == ["now", "late"])


async def test_a_worker_that_stops_while_a_recipe_waits_leaves_the_job_to_another(configured: Redis) -> None:
    waits = asyncio.Event()

    async def wait(job: agx.Job) -> None:
        waits.set()
        await asyncio.Event().wait()

    async with working(agx.Worker({"support": make_recipe(wait)})):
        await submit()
        await waits.wait()
    async with working(agx.Worker({"support": make_recipe()})):
        events = await follow()
    assert events[-1]["body"]["outcome"] == "completed"


async def test_claims_of_workers_that_died_are_counted(configured: Redis) -> None:
    await submit()
    engine = current_engine()
    partitions = engine.queues.partitions
    assert partitions is not None
    first, second = (JobQueue(engine.control, "agx", partitions, worker=name, claim_ttl=0.2) for name in "ab")
    (job,) = [job for n in range(partitions) for job in await first.waiting(n)]
    assert await first.claim(job) == 1
    assert await first.claim(job) == 1  # renewed
    assert await second.claim(job) == 0
    assert await wait_until(lambda: second.claim(job)) == 2  # the first one died
    await second.give_back(job)
    assert await first.claim(job) == 2  # what was given back does not count


async def test_a_cancel_during_a_hand_over_reaches_the_next_process(configured: Redis) -> None:
    session = SessionKeys.of("agx", "acme", "ada", "s")
    bus, holder = current_engine().control, new_holder("r", 1)
    await bus.run(ACQUIRE, session.live, holder, 10_000)
    await bus.run(MARK_CANCELLED, session.live, session.cancel_channel)
    await bus.run(HAND_OVER, session.live, holder, gap_holder("r"), 10_000)
    assert parse_live(await configured.get(session.live)).is_gap_mark
    successor = new_holder("r", 2)
    assert (await bus.run(TAKE_OVER, session.live, successor, 10_000, "r"))[0] == 1
    taken = parse_live(await configured.get(session.live))
    assert (taken.kind, taken.holder) == ("cancelled", successor)


async def test_waiting_jobs_are_counted_by_scope_once_they_are_due(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "_MOST_JOBS", 2)  # fewer than there are
    for n in range(5):
        await submit(f"s{n}")
    await submit("later", delay=3_600)
    await submit("other", scope="globex")
    engine = current_engine()
    link = Link(cast("Any", configured))
    assert engine.queues.partitions is not None
    assert await gauges.count_jobs(link, "agx", engine.queues.partitions) == {"acme": 5, "globex": 1}


async def test_a_job_s_wait_is_a_fact_and_counts_from_when_it_is_due(configured: Redis) -> None:
    jobs: list[agx.Job] = []

    async def note(job: agx.Job) -> None:
        jobs.append(job)

    await submit(delay=0.2)
    before_ms = current_engine().clock.now_ms()
    async with working(agx.Worker({"support": make_recipe(note)})):
        await follow()
        started = await wait_until(lambda: _find_started(configured))
        after_ms = current_engine().clock.now_ms()
    (job,) = jobs
    assert before_ms - 5_000 < job.submitted_ms <= before_ms
    assert started.waited_ns is not None
    ended = (await read_recorded(configured, "agx:acme:1:s")).one(RunEnded)
    assert ended.first_text_ns is not None
    assert ended.first_text_ns >= started.waited_ns
    assert 0 <= started.waited_ns / 1e6 <= after_ms - job.submitted_ms - 200


async def _find_started(client: Redis) -> RunStarted | None:
    for key in await client.keys("agx::queue:*"):
        for _, fields in await client.xrange(key):
            if isinstance(fact := decode(fields[b"fact"]), RunStarted):
                return fact
    return None


async def test_no_job_starts_beside_a_run_that_became_alone_during_the_claim(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    async def note(job: agx.Job) -> None:
        started.append(job.session_id)

    worker = agx.Worker({"support": make_recipe(note)})
    is_done, given_back = asyncio.Event(), asyncio.Event()
    claim, give_back = JobQueue.claim, JobQueue.give_back

    async def run_alone() -> None:
        await is_done.wait()

    async def claim_during_a_takeover(queue: JobQueue, waiting: Waiting) -> int:
        if not worker.running:
            worker._start("poison", run_alone(), alone=True)
        return await claim(queue, waiting)

    async def note_give_back(queue: JobQueue, waiting: Waiting) -> None:
        await give_back(queue, waiting)
        given_back.set()

    with monkeypatch.context() as patch:
        patch.setattr(JobQueue, "claim", claim_during_a_takeover)
        patch.setattr(JobQueue, "give_back", note_give_back)
        await submit()
        async with working(worker):
            await wait_until(lambda: given_back.is_set() or started)
            found = worker.running, list(started)
            patch.undo()
            is_done.set()
            assert found == (1, [])
            await wait_until(lambda: started == ["s"])


async def test_a_job_that_cannot_be_started_is_not_tried_again_at_once(configured: Redis) -> None:
    def fail(job: agx.Job) -> Awaitable[agx.Call]:
        raise AssertionError("no recipe is asked")

    engine = current_engine()
    await engine.ready()
    postponed: list[str] = []
    queue = open_queue(engine, "worker")
    bad = agx.Job("run", "a/b", "ada", "s", "support")  # an id that no version would have accepted
    await queue.submit(bad, bad.encode(), delay=0, max_waiting=10)
    (waiting,) = [job for n in range(engine.queues.partitions or 1) for job in await queue.waiting(n)]
    claims = await queue.claim(waiting)
    with pytest.raises(ValueError, match="scope_id"):
        await start_job(
            engine, queue, waiting, recipes={"support": fail}, claims=claims, runs={}, postpone=postponed.append
        )
    assert postponed == [waiting.entry_id]
    assert await open_queue(engine, "other").claim(waiting) == 1  # given back, and not counted


async def test_a_worker_claims_a_job_again_that_it_gave_back(configured: Redis) -> None:
    engine = current_engine()
    await engine.ready()
    await submit()
    queue = open_queue(engine, "worker")
    (waiting,) = [job for n in range(engine.queues.partitions or 1) for job in await queue.waiting(n)]
    for _ in range(2):
        assert await queue.claim(waiting) == 1
        assert await queue.claim(waiting) == 1  # renewed
        await queue.give_back(waiting)


@pytest.mark.parametrize("steps", range(6))
async def test_a_worker_stops_in_whatever_step_it_is_woken(configured: Redis, steps: int) -> None:
    """Before Python 3.12 `asyncio.wait_for()` loses a cancellation that comes together with what it waits for."""
    worker = agx.Worker({"support": make_recipe()})
    running = asyncio.create_task(worker.run())
    await wait_until(lambda: worker.is_ready)
    worker._wake.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    worker.stop()
    await asyncio.wait_for(running, 20)


async def test_two_tenants_may_choose_the_same_run_id(configured: Redis) -> None:
    waits, proceed = asyncio.Event(), asyncio.Event()

    async def wait(job: agx.Job) -> None:
        if job.scope_id == "acme":
            waits.set()
            await proceed.wait()

    async with working(agx.Worker({"support": make_recipe(wait)})):
        await submit(run_id="same")
        await waits.wait()
        await submit(scope="globex", run_id="same")
        others = [event async for event in agx.listen("globex", "ada", "s", serialize=False, wait=5)]
        proceed.set()
        events = await follow()
    assert [events[-1]["body"]["outcome"] for events in (events, others) if events] == ["completed", "completed"]


async def test_a_worker_whose_clock_is_behind_takes_jobs(configured: Redis) -> None:
    """As after a pause of the machine, in which the monotonic clock stands still."""
    engine = current_engine()
    await engine.ready()
    engine.clock.sync(engine.clock.now_ms() - 3_600_000, time.monotonic_ns())
    await submit()
    async with working(agx.Worker({"support": make_recipe()})):
        events = [event async for event in agx.listen("acme", "ada", "s", serialize=False, wait=5)]
    assert events
    assert events[-1]["body"]["outcome"] == "completed"


UNUSABLE: list[dict[str, Any]] = [
    {"agent": 5}, {"agent": ""}, {"agent": "a" * 201}, {"agent": "\ud800"},
    {"prompt": b"Hello"}, {"prompt": 5}, {"prompt": [5]}, {"prompt": {"Hello": 1}}, {"prompt": ["\ud800"]},
    {"args": "abc"}, {"args": {"n": float("nan")}}, {"args": {"n": [{"m": float("-inf")}]}}, {"args": {"n": int}},
    {"args": {1: 2}}, {"args": {"text": "x" * 65_536}}, {"args": {"text": "\ud800"}}, {"args": {"n": 2**64}},
    {"delay": 1e300}, {"delay": -1}, {"delay": float("nan")}, {"delay": "1"},
    {"recover": float("inf")}, {"recover": float("nan")}, {"recover": 1e300}, {"recover": -1}, {"recover": None},
    {"max_attempts": 2.5}, {"max_attempts": 0}, {"max_attempts": True}, {"max_attempts": "3"},
    {"max_attempts": 2**70},
    {"on_busy": "queue"},
]  # fmt: skip


@pytest.mark.parametrize("options", UNUSABLE, ids=lambda options: f"{options!r:.30}")
async def test_submit_refuses_what_no_worker_can_use_before_redis_is_asked(options: dict[str, Any]) -> None:
    agx.configure(agx.Config(redis=Redis.from_url("redis://127.0.0.1:1")))  # nothing listens there
    try:
        with pytest.raises(agx.JobError, match=next(iter(options))):
            await submit(**options)
        if not options.keys() & {"args", "agent"}:
            return
        resume = {"resume": options.get("agent", "support"), "args": options.get("args")}
        with pytest.raises(agx.JobError, match=next(iter(options))):
            await agx.run(FakeSession(), Agent(TestModel(), deps_type=ScopeDeps), "Hello", ScopeDeps(), **resume)
    finally:
        await agx.aclose()
