"""What a failover loses of what was acknowledged is appended again; shown by taking keys back in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.recorded import read_facts, read_recorded
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.facts import schema as facts
from agx.redis import keys

STREAM = "agx:1:1:s"


class Talker:
    """A model that says what the test puts, word by word, until it is done."""

    def __init__(self) -> None:
        self._words: asyncio.Queue[str | None] = asyncio.Queue()

    def say(self, *words: str) -> None:
        for word in words:
            self._words.put_nowait(word)

    def finish(self) -> None:
        self._words.put_nowait(None)

    def agent(self) -> Agent[ScopeDeps, str]:
        async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
            while (word := await self._words.get()) is not None:
                yield word

        return Agent(FunctionModel(stream_function=speak), deps_type=ScopeDeps, name="talker")


async def lose(redis: Redis, key: str, dump: bytes) -> None:
    """Take a key back to what it was, and break all connections, as a failover does."""
    await redis.restore(key, 60_000, dump, replace=True)
    await redis.client_kill_filter(_type="normal", skipme=True)


async def seen(redis: Redis, word: str) -> bool:
    return any(word.encode() in fields[b"body"] for _, fields in await redis.xrange(STREAM))


@pytest.fixture
def talker() -> Talker:
    return Talker()


@pytest.fixture
async def run(configured: Redis, talker: Talker) -> asyncio.Task[Any]:
    return asyncio.create_task(agx.run(FakeSession(), talker.agent(), "Hi", deps=ScopeDeps()))


async def received() -> list[dict[str, Any]]:
    """Listen until the end; return the bodies of the events."""
    return [event["body"] async for event in agx.listen(1, 1, "s", serialize=False)]


def check_complete(bodies: list[dict[str, Any]], text: str) -> None:
    assert [body["seq"] for body in bodies] == list(range(len(bodies)))
    parts = [body for body in bodies if "part_kind" in body]
    assert "".join(body.get("content_delta", body.get("content", "")) for body in parts) == text


async def test_entries_lost_in_mid_run(configured: Redis, run: asyncio.Task[Any], talker: Talker) -> None:
    listening = asyncio.create_task(received())
    talker.say("one ")
    await wait_until(lambda: seen(configured, "one "))
    before = await configured.dump(STREAM)
    talker.say("two ")
    await wait_until(lambda: seen(configured, "two "))
    entries = await configured.xrange(STREAM)
    await lose(configured, STREAM, before)
    talker.say("three")
    talker.finish()

    assert (await run).output == "one two three"
    check_complete(await listening, "one two three")
    assert (await configured.xrange(STREAM))[: len(entries)] == entries  # the same ids, the same bodies


async def test_entries_lost_while_the_model_is_silent(
    configured: Redis, run: asyncio.Task[Any], talker: Talker
) -> None:
    """Nothing more is written, so only a look can tell; a listener that comes later must not miss them."""
    talker.say("one ")
    await wait_until(lambda: seen(configured, "one "))
    before = await configured.dump(STREAM)
    talker.say("two ")
    await wait_until(lambda: seen(configured, "two "))
    await lose(configured, STREAM, before)
    assert not await seen(configured, "two ")
    await agx.is_live(1, 1, "s")  # whichever connection is used next tells of the break
    await wait_until(lambda: seen(configured, "two "))
    talker.finish()
    await run


async def test_the_end_lost_after_the_run_returned(configured: Redis, run: asyncio.Task[Any], talker: Talker) -> None:
    talker.say("all of it")
    await wait_until(lambda: seen(configured, "all of it"))
    before = await configured.dump(STREAM)
    talker.finish()
    await run
    await lose(configured, STREAM, before)
    await agx.is_live(1, 1, "s")
    check_complete(await received(), "all of it")
    assert 60 < await configured.ttl(STREAM) <= 300


async def test_everything_lost(configured: Redis, run: asyncio.Task[Any], talker: Talker) -> None:
    """A server that kept nothing on disk is restarted: the run has its lease and its stream again."""
    listening = asyncio.create_task(received())
    talker.say("one ")
    await wait_until(lambda: seen(configured, "one "))
    await configured.flushall()
    await configured.client_kill_filter(_type="normal", skipme=True)
    talker.say("two")
    await wait_until(lambda: seen(configured, "two"))
    talker.finish()
    assert (await run).output == "one two"
    check_complete(await listening, "one two")
    recorded = await read_recorded(configured)
    check_complete([entry.body for entry in recorded.entries], "one two")
    assert recorded.one(facts.RunEnded).outcome == "completed"


async def test_lost_entries_behind_which_somebody_added(
    configured: Redis, run: asyncio.Task[Any], talker: Talker
) -> None:
    """Their ids are taken, so they come under new ones: nobody misses them."""
    talker.say("one ")
    await wait_until(lambda: seen(configured, "one "))
    before = await configured.dump(STREAM)
    talker.say("two ")
    await wait_until(lambda: seen(configured, "two "))
    await configured.restore(STREAM, 60_000, before, replace=True)
    await configured.xadd(STREAM, {"type": "info", "origin": "other", "body": "{}"})
    talker.say("three")
    talker.finish()
    await run
    recorded = await read_recorded(configured)
    check_complete([entry.body for entry in recorded.entries if entry.origin != "other"], "one two three")


async def test_a_run_that_another_replaced_meanwhile_writes_nothing(
    configured: Redis, run: asyncio.Task[Any], talker: Talker
) -> None:
    talker.say("one ")
    await wait_until(lambda: seen(configured, "one "))
    body = '{"run_id": "another"}'
    # At once: a look at a stream that is gone would put back what it has lost.
    replacing = configured.pipeline(transaction=True).delete(STREAM)
    replacing.xadd(STREAM, {"type": "begin", "origin": "opale", "body": body}).expire(STREAM, 60)
    await replacing.execute()
    entries = await configured.xrange(STREAM)
    await configured.client_kill_filter(_type="normal", skipme=True)
    await agx.is_live(1, 1, "s")
    with pytest.raises(agx.LeaseLostError):
        await run
    assert await configured.xrange(STREAM) == entries


async def test_facts_lost(configured: Redis, run: asyncio.Task[Any], talker: Talker) -> None:
    queue = keys.queue("agx", keys.partition("1", 8))

    async def started() -> bool:
        return any(isinstance(fact, facts.RunStarted) for fact in await read_facts(configured))

    await wait_until(started)
    before = await configured.dump(queue)
    talker.say("one")
    talker.finish()
    await run
    all_ids = {fact.id for fact in await read_facts(configured)}
    await lose(configured, queue, before)
    assert {fact.id for fact in await read_facts(configured)} < all_ids
    await agx.is_live(1, 1, "s")

    async def again() -> bool:
        return {fact.id for fact in await read_facts(configured)} == all_ids

    await wait_until(again)


async def check_retained() -> None:
    """Have all sessions compare their streams with what they retain, as after a broken connection, to the end."""
    engine = current_engine()
    engine.write_side.streams.check_all()
    # A comparison is a few commands, one after the other, on the connection of the appends.
    for _ in range(10):
        await engine.appends.execute("PING")


@pytest.fixture
def short(configured: Redis) -> Redis:
    """Streams expire a second after their `end`, while their entries are retained for much longer."""
    agx.configure(agx.Config(configured, lease_ttl=15, retention=1))
    return configured


async def test_a_stream_that_expired_was_not_lost(short: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Whenever the retained entries are compared with it: before, while and after it expires."""

    async def run_and_stop(n: int) -> None:
        talker = Talker()
        talker.say("one")
        talker.finish()
        await agx.run(FakeSession(), talker.agent(), "Hi", deps=ScopeDeps(session_id=f"run{n}"))
        await agx.start(1, 1, f"opened{n}")
        await agx.stop(1, 1, f"opened{n}", grace_period=1)

    await asyncio.gather(*(run_and_stop(n) for n in range(50)))
    streams = [f"agx:1:1:{kind}{n}" for kind in ("run", "opened") for n in range(50)]
    while await short.exists(*streams):
        await check_retained()
    for _ in range(3):
        await check_retained()
    assert not await short.exists(*streams)
    assert not [record for record in caplog.records if "lost" in record.getMessage()]


async def test_nothing_is_appended_again_to_what_follows_an_expired_stream(short: Redis) -> None:
    await agx.start(1, 1, "s")
    await agx.stop(1, 1, "s", grace_period=1)
    await wait_until(lambda: _is_gone(short))
    await agx.add(1, 1, "s", type="info", origin="other")
    await check_retained()
    assert [fields[b"type"] for _, fields in await short.xrange(STREAM)] == [b"info"]


async def _is_gone(redis: Redis) -> bool:
    return not await redis.exists(STREAM)


async def test_an_end_that_was_lost_is_repaired_after_the_time_of_its_expiry(short: Redis, talker: Talker) -> None:
    """The replica that leads now never got the `end`, nor the short expiry that came with it."""
    run = asyncio.create_task(agx.run(FakeSession(), talker.agent(), "Hi", deps=ScopeDeps()))
    talker.say("all of it")
    await wait_until(lambda: seen(short, "all of it"))
    before = await short.dump(STREAM)
    talker.finish()
    await run
    await wait_until(lambda: _is_gone(short))
    await short.restore(STREAM, 60_000, before)
    await check_retained()
    check_complete(await received(), "all of it")
    assert await short.ttl(STREAM) <= 1
