"""`listen()` and `sse()`: one run from its first event or behind a cursor, to its end (contract, sections 3 and 4)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import Gate, ScopeDeps, scripted
from support.recorded import read_stream
from support.waiting import wait_until

import agx
from agx.engine.lease import Lease
from agx.engine.registry import current_engine
from agx.redis.recovery_window import StreamEnds
from agx.testing import MemorySession, collect

Event = dict[str, Any]


def start_run(*replies: Any, session: str = "s") -> asyncio.Task[Any]:
    return asyncio.create_task(
        agx.run(MemorySession(id=session), Agent(scripted(*replies)), "hi", deps=ScopeDeps(session_id=session))
    )


def text(events: list[Event]) -> str:
    return "".join(e["body"].get("content", "") + e["body"].get("content_delta", "") for e in events)


async def listened(**kwargs: Any) -> list[Event]:
    return [event async for event in agx.listen(1, 1, "s", serialize=False, **kwargs)]


# --- resuming ---


async def test_it_resumes_behind_every_event_of_an_ended_run(configured: Redis) -> None:
    await start_run(["one", " two", " three"])
    events = await listened()
    for n, event in enumerate(events):
        assert await listened(after=event["id"]) == events[n + 1 :]


async def test_it_resumes_in_the_middle_of_a_live_run(configured: Redis) -> None:
    gate = Gate()
    running = start_run(["one", gate, " two"])
    seen: list[Event] = []
    async with contextlib.aclosing(agx.listen(1, 1, "s", serialize=False)) as events:
        async for event in events:
            seen.append(event)
            if event["body"].get("event") == "part_start":
                break
    rest = asyncio.create_task(listened(after=seen[-1]["id"]))
    await wait_until(lambda: current_engine().hub.listeners)
    gate.open.set()
    await running
    assert seen + await rest == await listened()
    assert text(seen + await rest) == "one two"


async def test_a_cursor_that_was_trimmed_away_gets_a_gap_first(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(client))
        await start_run(["a"], session="s")
        events = await listened()
        await client.xtrim("agx:1:1:s", maxlen=3, approximate=False)
        gap, *rest = await listened(after=events[1]["id"])
        assert (gap["type"], gap["origin"], gap["body"]) == ("info", "opale", {"gap": True})
        assert gap["id"] == events[1]["id"]  # so that whoever resumes behind it misses nothing either
        assert rest == events[-3:]
        assert await listened(after=events[-3]["id"]) == events[-2:]
        await agx.aclose()


async def test_a_cursor_of_the_run_before_is_superseded(configured: Redis) -> None:
    await start_run(["first"])
    first = await listened()
    gate = Gate()
    running = start_run(["second", gate])
    await gate.reached.wait()
    (gap,) = await listened(after=first[3]["id"])
    begin = (await read_stream(configured))[0]
    assert (gap["type"], gap["body"]) == ("info", {"gap": True, "superseded_by": begin.body["run_id"]})
    gate.open.set()
    await running


async def test_an_event_source_whose_run_was_replaced_goes_on_with_the_next(configured: Redis) -> None:
    await start_run(["first"])
    old = (await listened())[3]["id"]
    await start_run(["second"])
    (told,) = [frame async for frame in agx.sse(1, 1, "s", last_event_id=old)]
    assert '"superseded_by"' in told
    last_event_id = told.splitlines()[0].removeprefix("id: ")
    frames = [frame async for frame in agx.sse(1, 1, "s", last_event_id=last_event_id)]
    assert [json.loads(frame.partition("data: ")[2]) for frame in frames] == await listened()


async def test_a_listener_of_a_run_that_is_replaced_gets_the_id_of_the_new_run(configured: Redis) -> None:
    """Its run died without an end, another began on the session."""
    await configured.xadd("agx:1:1:s", {"type": "begin", "origin": "opale", "body": '{"run_id": "dead"}'})
    await configured.expire("agx:1:1:s", 60)
    following = agx.listen(1, 1, "s", serialize=False)
    begun = await anext(following)
    replaced: dict[Any, Any] = {"type": "begin", "origin": "opale", "body": '{"run_id": "next"}'}
    await configured.xadd("agx:1:1:s", replaced, maxlen=1, approximate=False)
    (gap,) = [event async for event in following]
    assert begun["body"] == {"run_id": "dead"}
    assert (gap["type"], gap["body"]) == ("info", {"gap": True, "superseded_by": "next"})


async def test_a_listener_whose_stream_expired_gets_a_gap_and_not_a_lost_run(configured: Redis) -> None:
    agx.configure(agx.Config(redis=configured, lease_ttl=0.3))
    await configured.xadd("agx:1:1:s", {"type": "begin", "origin": "opale", "body": '{"run_id": "other"}'})
    following = agx.listen(1, 1, "s", serialize=False)
    assert (await anext(following))["type"] == "begin"
    await configured.delete("agx:1:1:s")  # as its expiry does
    (gap,) = [event async for event in following]
    assert (gap["type"], gap["body"]) == ("info", {"gap": True})


async def test_behind_an_end_there_is_nothing(configured: Redis) -> None:
    await start_run(["a"])
    end = (await listened())[-1]
    # An hour of patience, and yet it returns at once.
    async with asyncio.timeout(30):
        assert await listened(after=end["id"], timeout=3_600) == []
        assert [frame async for frame in agx.sse(1, 1, "s", last_event_id=end["id"])] == []


# --- turn after turn ---


async def test_a_second_turn_right_after_end(configured: Redis) -> None:
    runs = []
    for turn in range(20):
        runs.append(start_run([f"turn {turn}"]))
        # With its `end` the next turn begins, though the run itself may still hold its lease.
        assert text(await listened()) == f"turn {turn}"
    await asyncio.gather(*runs)


async def test_a_listener_right_behind_create_task_never_replays_the_run_before(configured: Redis) -> None:
    """As the seed's FastAPI example does it, while the previous run is still kept."""
    for turn in range(20):
        running = start_run([f"turn {turn}"])
        first = [event async for event in agx.listen(1, 1, "s", serialize=False)]
        assert text(first) == f"turn {turn}"
        assert [event["type"] for event in first].count("begin") == 1
        await running


async def test_the_same_for_start_and_for_many_listeners(configured: Redis) -> None:
    await start_run(["old"])
    starting = asyncio.create_task(agx.start(1, 1, "s"))
    listening = [asyncio.create_task(listened()) for _ in range(20)]
    await starting
    await agx.stop(1, 1, "s")
    for events in await asyncio.gather(*listening):
        assert [event["type"] for event in events] == ["begin", "end"]


async def test_a_listener_that_leaves_during_a_start_disturbs_neither_the_run_nor_other_listeners(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, leases = Gate(), current_engine().leases
    acquire = leases.acquire

    async def slow_acquire(lease: Lease) -> StreamEnds:
        gate.reached.set()
        await gate.open.wait()
        return await acquire(lease)

    monkeypatch.setattr(leases, "acquire", slow_acquire)
    running = start_run(["answer"])
    leaving, staying = (asyncio.create_task(listened()) for _ in range(2))
    await gate.reached.wait()
    for _ in range(3):  # both wait for the `begin`
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait({leaving})
    gate.open.set()
    await running
    assert text(await staying) == "answer"


async def test_a_start_that_fails_leaves_the_listener_with_what_is_kept(configured: Redis) -> None:
    gate = Gate()
    running = start_run(["live", gate])
    await gate.reached.wait()
    refused = start_run(["never"])
    listening = asyncio.create_task(listened())
    with pytest.raises(agx.SessionBusyError):
        await refused
    gate.open.set()
    await running
    assert text(await listening) == "live"


# --- slow listeners, leaving ---


async def test_a_slow_listener_never_skips(configured: Redis) -> None:
    """It takes nothing while far more is written than its queue holds."""
    gate = Gate()
    words = [f"{n} " for n in range(200)]
    running = start_run(["begin ", gate, *words])
    slow = agx.listen(1, 1, "s", serialize=False)
    async with contextlib.aclosing(slow):
        seen = [await anext(slow)]
        await gate.reached.wait()
        for n in range(3_000):
            await agx.add(1, 1, "s", type="info", origin="mine", body={"n": n})
        gate.open.set()
        await running
        seen += [event async for event in slow]
    assert [event["id"] for event in seen] == [entry.id for entry in await read_stream(configured)]
    assert [event["body"]["n"] for event in seen if event["type"] == "info"] == list(range(3_000))
    assert text(seen) == "begin " + "".join(words)


def agx_tasks() -> set[str]:
    """Name what runs; a bus sends for a moment, whoever asked it to."""
    return {task.get_name() for task in asyncio.all_tasks() if not task.done()} - {"agx-bus"}


@pytest.fixture
async def running(configured: Redis) -> AsyncIterator[asyncio.Task[Any]]:
    """A run that goes on until its test is over."""
    gate = Gate()
    task = start_run(["a", gate])
    await gate.reached.wait()
    yield task
    gate.open.set()
    await task


async def test_a_cancelled_listener_leaks_nothing(configured: Redis, running: asyncio.Task[Any]) -> None:
    await listened(timeout=0)  # the hub's own tasks are there now
    hub, tasks = current_engine().hub, agx_tasks()
    for sudden in (True, False):
        listening = [asyncio.create_task(listened(), name="listener") for _ in range(20)]
        if not sudden:
            await wait_until(lambda: hub.listeners == 20)
        for each in listening:
            each.cancel()
        ended = await asyncio.gather(*listening, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended)
        assert hub.listeners == 0
        await wait_until(lambda: not agx_tasks() - tasks, what=f"no more tasks than {tasks}")


async def test_a_listener_that_breaks_off_leaks_nothing(configured: Redis, running: asyncio.Task[Any]) -> None:
    await listened(timeout=0)
    hub, tasks = current_engine().hub, agx_tasks()
    async with contextlib.aclosing(agx.listen(1, 1, "s")) as events:
        async for _ in events:
            break
    async with contextlib.aclosing(agx.sse(1, 1, "s")) as frames:
        async for _ in frames:
            break
    assert hub.listeners == 0
    await wait_until(lambda: not agx_tasks() - tasks, what=f"no more tasks than {tasks}")


async def test_no_subscription_is_left_when_nobody_listens(configured: Redis) -> None:
    for n in range(30):
        session = f"s{n}"
        running = start_run(["a"], session=session)
        assert (await collect(1, 1, session))[-1]["type"] == "end"
        await running

    async def are_few() -> bool:
        channels: list[Any] = await configured.pubsub_channels("agx:*")
        return len(channels) <= 2

    # The hub keeps one, so that its connection stays; those that it has just left go with its next message.
    await wait_until(are_few)


# --- server-sent events ---


def parse(frame: str) -> Event:
    first, second = frame.removesuffix("\n\n").split("\n")
    assert first.startswith("id: ")
    event: Event = json.loads(second.removeprefix("data: "))
    assert event["id"] == first.removeprefix("id: ")
    return event


async def test_frames_are_the_events_with_their_ids(configured: Redis) -> None:
    await start_run(["one\n\ndata: sneaky", "\r\n two\u2028"])
    frames = [frame async for frame in agx.sse(1, 1, "s")]
    assert all(frame.endswith("\n\n") and len(frame.splitlines()) >= 3 for frame in frames)
    assert [parse(frame) for frame in frames] == await listened()
    assert text([parse(frame) for frame in frames]) == "one\n\ndata: sneaky\r\n two\u2028"


async def test_a_silent_run_is_kept_open_by_comments(configured: Redis) -> None:
    gate = Gate()
    running = start_run(["a", gate, "b"])
    frames: list[str] = []
    async for frame in agx.sse(1, 1, "s", keep_alive=0.05):
        frames.append(frame)
        # Longer than the look at the lease, so a follower that took silence for an end would be gone.
        if frames.count(": keep-alive\n\n") == 30:
            gate.open.set()
    await running
    events = [parse(frame) for frame in frames if not frame.startswith(":")]
    assert text(events) == "ab"
    assert events == await listened()


async def test_a_browser_that_comes_back_to_a_silent_run_goes_on(configured: Redis) -> None:
    gate = Gate()
    running = start_run(["a", gate, "b"])
    await gate.reached.wait()
    last = (await listened(timeout=0.5))[-1]
    frames: list[str] = []
    async for frame in agx.sse(1, 1, "s", last_event_id=last["id"], keep_alive=0.05):
        frames.append(frame)
        if frames.count(": keep-alive\n\n") == 30:
            gate.open.set()
    await running
    events = [parse(frame) for frame in frames if not frame.startswith(":")]
    assert events == await listened(after=last["id"])
    assert events[-1]["type"] == "end"


async def test_nothing_comes_behind_an_end(configured: Redis) -> None:
    gate = Gate()
    gate.open.set()
    running = start_run(["a", gate])
    frames = [frame async for frame in agx.sse(1, 1, "s", keep_alive=0.01)]
    await running
    assert parse(frames[-1])["type"] == "end"


async def test_no_run_at_all_gives_no_frame(configured: Redis) -> None:
    assert [frame async for frame in agx.sse(1, 1, "nobody") if not frame.startswith(":")] == []


@pytest.mark.parametrize("start", ["0", "0-0"])
async def test_behind_zero_is_from_the_start(configured: Redis, start: str) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted(["all"]), deps_type=ScopeDeps)
    await agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps())
    whole = await collect(1, 1, "s")
    assert [event["type"] for event in (whole[0], whole[-1])] == ["begin", "end"]
    assert await collect(1, 1, "s", after=start) == whole
