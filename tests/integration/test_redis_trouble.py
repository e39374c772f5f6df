"""Redis in trouble under a live run: the agent goes on, nothing is lost, an outage is neither cancel nor death."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis
from support.agents import FakeSession, Gate, ScopeDeps, scripted
from support.leaks import leak_checked
from support.proxy import Proxy
from support.recorded import read_recorded
from support.sdk import installed_sdk
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.facts import schema as facts
from agx.redis import keys
from agx.redis.redis_py import Connection

LEASE = 0.6  # seconds


@dataclass
class Talk:
    """a run that streams until it is stopped, and a listener in the same process."""

    running: asyncio.Task[Any]
    hearing: asyncio.Task[list[dict[str, Any]]]
    session: FakeSession
    said: list[str]
    stop: asyncio.Event

    async def go_on(self, words: int = 10) -> None:
        """Wait until the model has said so many more words: Redis does not hold it up."""
        least = len(self.said) + words
        await wait_until(lambda: len(self.said) >= least)

    async def finish(self) -> None:
        """End the run; fails unless it is whole for everybody."""
        self.stop.set()
        text = "".join(self.said)
        assert (await self.running).output == text
        events = await self.hearing
        assert [event["body"]["seq"] for event in events] == list(range(len(events)))
        parts = [event["body"] for event in events if "part_kind" in event["body"]]
        assert "".join(body.get("content_delta", body.get("content", "")) for body in parts) == text
        assert events[-1]["body"]["outcome"] == "completed"
        assert self.session.saves == 1


def start_talk() -> Talk:
    said: list[str] = []
    stop = asyncio.Event()

    async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        while not stop.is_set():
            said.append(f"{len(said)} ")
            yield said[-1]
            await asyncio.sleep(0.01)

    agent: Agent[ScopeDeps, str] = Agent(FunctionModel(stream_function=speak), deps_type=ScopeDeps)
    session = FakeSession()
    running = asyncio.create_task(agx.run(session, agent, "Hi", deps=ScopeDeps()))

    async def hear() -> list[dict[str, Any]]:
        return [event async for event in agx.listen(1, 1, "s", serialize=False)]

    return Talk(running, asyncio.create_task(hear()), session, said, stop)


@pytest.fixture
def own_server() -> AsyncIterator[EmbeddedServer]:
    """A server of the test's own, to be reconfigured."""
    with EmbeddedServer() as server, leak_checked(server.url):
        yield server


@pytest.fixture
async def redis(own_server: EmbeddedServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_server.url) as client:
        yield client


@pytest.fixture
async def proxy(own_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(own_server.port) as proxy, Redis.from_url(proxy.url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE))
        yield proxy
        await agx.aclose()


@pytest.fixture
async def talk(proxy: Proxy) -> AsyncIterator[Talk]:
    talk = start_talk()
    await talk.go_on()
    yield talk
    await talk.finish()


async def test_an_outage_longer_than_the_lease(talk: Talk, proxy: Proxy, redis: Redis) -> None:
    proxy.refuse()
    await wait_until(lambda: _is_gone(redis))
    await talk.go_on()
    proxy.accept()
    await wait_until(lambda: agx.is_live(1, 1, "s"))  # taken again
    await talk.go_on()


async def test_a_cut_cable_longer_than_the_lease(talk: Talk, proxy: Proxy, redis: Redis) -> None:
    """Nobody says goodbye: only silence tells."""
    proxy.freeze()
    await wait_until(lambda: _is_gone(redis))
    await talk.go_on()
    proxy.thaw()
    await wait_until(lambda: agx.is_live(1, 1, "s"))


async def test_full_memory(talk: Talk, redis: Redis) -> None:
    await _while_refused(
        talk, redis, lambda: redis.config_set("maxmemory", "1mb"), lambda: redis.config_set("maxmemory", "0")
    )


async def test_a_primary_that_became_a_replica(talk: Talk, redis: Redis) -> None:
    """Writes are refused until it is a primary again; the lease expires meanwhile."""
    await _while_refused(
        talk, redis, lambda: redis.execute_command("REPLICAOF", "127.0.0.1", "1"), lambda: redis.replicaof("NO", "ONE")
    )


async def test_slow_answers(talk: Talk, proxy: Proxy) -> None:
    proxy.delay = 0.3
    await talk.go_on(50)
    proxy.delay = 0.0


async def test_everything_killed_and_restarted(talk: Talk, proxy: Proxy, own_server: EmbeddedServer) -> None:
    """The server keeps nothing: all keys are gone, and written again."""
    own_server.kill()
    await talk.go_on()
    own_server.start()
    await talk.go_on()


@pytest.mark.parametrize("with_deadline", [False, True])
async def test_all_data_deleted_under_intact_connections(talk: Talk, redis: Redis, with_deadline: bool) -> None:
    """B5: only a client of the older package deletes a lease to cancel, and it deletes nothing else.

    With a deadline: a renewal was answered before the loss, and its deadline is written behind it.
    """
    leases = keys.leases("agx", keys.partition("1", agx.Config.queue_partitions))
    deadlines = await wait_until(lambda: redis.zrange(leases, 0, -1, withscores=True))
    async with redis.pipeline(transaction=True) as at_once:
        at_once.flushall()
        if with_deadline:
            at_once.zadd(leases, dict(deadlines))
        await at_once.execute()
    await wait_until(lambda: agx.is_live(1, 1, "s"))
    await talk.go_on()
    await wait_until(lambda: redis.exists("agx::meta"))  # for the sidecar


async def test_one_line_tells_of_an_outage(proxy: Proxy, caplog: pytest.LogCaptureFixture, redis: Redis) -> None:
    caplog.set_level(logging.WARNING, logger="agx")
    talk = start_talk()
    await talk.go_on()
    proxy.refuse()
    await wait_until(lambda: _is_gone(redis))
    proxy.accept()
    await wait_until(lambda: any("Redis is back" in record.message for record in caplog.records))
    await talk.finish()
    outage = [record for record in caplog.records if "runs go on" in record.message]
    assert len(outage) == 1
    assert not [record for record in caplog.records if record.exc_info]
    recorded = await read_recorded(redis)
    ended = recorded.one(facts.RunEnded)
    assert ended.stream is not None
    assert ended.stream.retries > 0


async def test_a_start_without_redis_fails_in_time(proxy: Proxy) -> None:
    for trouble in (proxy.refuse, proxy.freeze):
        trouble()
        began = time.monotonic()
        with pytest.raises(agx.RedisUnavailableError, match="start the run"):
            await agx.run(FakeSession(), Agent("test"), "Hi", deps=ScopeDeps())
        assert time.monotonic() - began < 30
    proxy.accept()
    proxy.thaw()


async def test_a_run_that_was_finished_meanwhile_tells_nothing_more(proxy: Proxy, redis: Redis) -> None:
    """Its agent ends while the network is cut and a sidecar, which takes the process for dead, tells its end."""
    gate, session = Gate(), FakeSession()
    with installed_sdk() as spans:
        agent: Agent[ScopeDeps, str] = Agent(scripted(["one ", gate, "two"], ["again"]), deps_type=ScopeDeps)
        running = asyncio.create_task(agx.run(session, agent, "Hi", deps=ScopeDeps()))
        await gate.reached.wait()
        proxy.freeze()
        await wait_until(lambda: _is_gone(redis))
        gate.open.set()
        await wait_until(lambda: session.saves == 1)
        for word in ("error", "end"):
            await redis.xadd("agx:1:1:s", {"type": word, "origin": "opale", "body": "{}"})
        proxy.thaw()
        with pytest.raises(agx.LeaseLostError):
            await running
        assert (await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps(session_id="s2"))).output == "again"
    recorded = await read_recorded(redis)
    assert [entry.type for entry in recorded.entries][-2:] == ["error", "end"]
    assert {fact.session for fact in recorded.of(facts.RunEnded)} == {"s2"}
    assert {fact.session for fact in recorded.of(facts.NodeEnded) if fact.model is not None} == {"s2"}
    assert [dict(span.attributes or {})["agx.session.id"] for span in spans.named("agx.run")] == ["s2"]


async def test_a_run_whose_end_a_sidecar_has_told_tells_it_no_second_time(
    proxy: Proxy, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `end` was appended, but it has not heard so before its lease ran out: only the fact was missing."""
    session, may_save = FakeSession(), asyncio.Event()
    session.may_save = may_save
    write = Connection.write

    def withhold_end(connection: Connection, packed: bytes) -> None:
        # Not earlier: the `end` would wait behind a command whose reply is withheld.
        if b"\r\nend\r\n" in packed:
            proxy.withhold_answers()
        write(connection, packed)

    monkeypatch.setattr(Connection, "write", withhold_end)
    with installed_sdk() as spans:
        agent: Agent[ScopeDeps, str] = Agent(scripted(["one"], ["again"]), deps_type=ScopeDeps)
        running = asyncio.create_task(agx.run(session, agent, "Hi", deps=ScopeDeps()))
        await session.saving.wait()
        await wait_until(lambda: _has_answered(redis))
        may_save.set()
        await wait_until(lambda: _has_ended(redis))
        await wait_until(lambda: _is_gone(redis))
        began = (await read_recorded(redis)).one(facts.RunStarted)
        of_run = {name: getattr(began, name) for name in facts.RunFact.__dataclass_fields__}
        end = facts.RunEnded(**{**of_run, "id": f"{began.run_id}:end"}, outcome="completed", start_ns=1, end_ns=2,
                             partial=True)  # fmt: skip
        await redis.xadd(keys.queue("agx", keys.partition("1", 8)), {facts.FIELD: facts.encode(end)})
        monkeypatch.undo()
        proxy.thaw()
        assert (await running).output == "one"
        assert (await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps(session_id="s2"))).output == "again"
        await agx.aclose()
    recorded = await read_recorded(redis)
    assert [(fact.session, fact.partial) for fact in recorded.of(facts.RunEnded)] == [("s", True), ("s2", False)]
    assert [dict(span.attributes or {})["agx.session.id"] for span in spans.named("agx.run")] == ["s2"]
    assert not await redis.exists("agx:1:1:s:live")


async def _has_answered(redis: Redis) -> bool:
    recorded = await read_recorded(redis)
    return bool(recorded.of(facts.NodeEnded)) and any(body["event"] == "answer" for body in recorded.bodies("event"))


async def _has_ended(redis: Redis) -> bool:
    return bool((await read_recorded(redis)).bodies("end"))


async def _is_gone(redis: Redis) -> bool:
    return not await redis.exists("agx:1:1:s:live")


async def _while_refused(
    talk: Talk, redis: Redis, refuse: Callable[[], Awaitable[Any]], allow: Callable[[], Awaitable[Any]]
) -> None:
    await refuse()
    length = await redis.xlen("agx:1:1:s")
    await talk.go_on(20)
    assert await redis.xlen("agx:1:1:s") == length
    await allow()

    async def goes_on() -> bool:
        return await redis.xlen("agx:1:1:s") > length

    await wait_until(goes_on)


async def test_a_task_cancelled_while_its_begin_is_on_its_way_has_an_end(proxy: Proxy, redis: Redis) -> None:
    talk = start_talk()
    stream = keys.SessionKeys.of("agx", "1", "1", "s").stream
    proxy.delay = 0.05  # of a lease of 0.9 s that opening, with its several round trips, has to stay within
    await wait_until(lambda: redis.exists(stream))  # the server has it, and its answer is on the way
    talk.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await talk.running
    proxy.delay = 0.0
    events = await talk.hearing
    assert [event["type"] for event in events] == ["begin", "error", "end"]
    assert (events[-1]["body"]["outcome"], events[-1]["body"]["reason"]) == ("cancelled", "task")
    await wait_until(lambda: gone(redis))

    async def has_facts() -> bool:
        recorded = await read_recorded(redis)
        return recorded.one(facts.RunStarted).run_id == recorded.one(facts.RunEnded).run_id

    await wait_until(has_facts)
    assert not talk.said


async def gone(redis: Redis) -> bool:
    """Whether nobody holds the session's lease."""
    return not await redis.exists(keys.SessionKeys.of("agx", "1", "1", "s").live)
