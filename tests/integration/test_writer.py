"""The append rule (contract, section 4): whatever happens on the way, no gap, no repeat, and nothing behind a fence."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from support.agents import FakeSession, Gate, ScopeDeps, scripted
from support.proxy import Proxy
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.engine.registry import current_engine
from agx.redis.redis_py import Reply
from agx.redis.retry import Backoff
from agx.redis.supervisor import Supervisor
from agx.runs.recording.run_events import RunEvents
from agx.stream.entry import StreamEntry
from agx.stream.group_commit import GroupCommit
from agx.stream.stream_tail import StreamTail
from agx.stream.writer import SessionWriter

STREAM = "agx:1:1:s"


@dataclass
class Entry:
    """An entry of the stream, as a stranger reads it."""

    id: tuple[int, int]
    type: str
    body: dict[str, Any]


@dataclass
class Line:
    """A session opened through a proxy, and a client that goes straight to the server."""

    proxy: Proxy
    redis: Redis
    said: int = 0

    async def say(self, count: int = 1) -> None:
        for _ in range(count):
            await agx.add(1, 1, "s", type="info", origin="test", body={"n": self.said})
            self.said += 1

    async def intrude(self, type: str = "info", *, id: str = "*", **options: Any) -> tuple[int, int]:
        """Append as another process would: without a `seq`."""
        fields = {"type": type, "origin": "other", "body": '{"run_id": "another"}'}
        entry_id = await self.redis.xadd(STREAM, fields, id=id, **options)
        await self.redis.expire(STREAM, 60)
        return _parse(entry_id)

    async def read(self) -> list[Entry]:
        return [
            Entry(_parse(entry_id), fields[b"type"].decode(), orjson.loads(fields[b"body"]))
            for entry_id, fields in await self.redis.xrange(STREAM)
        ]

    async def arrived(self) -> bool:
        """Whether all that was said is there."""
        return sum("n" in entry.body for entry in await self.read()) >= self.said

    async def settled(self) -> list[Entry]:
        """Wait until all that was said is there, and return the stream, which nothing may change any more."""
        await wait_until(self.arrived)
        # The next reply tells that no resend is under way: one batch of a session is in flight.
        await self.say()
        await wait_until(self.arrived)
        return await self.read()

    def check(self, entries: list[Entry]) -> None:
        """Our entries have no gap and no repeat, and all ids rise."""
        ours = [entry for entry in entries if "seq" in entry.body]
        assert [entry.body["seq"] for entry in ours] == list(range(len(ours)))
        assert [entry.body["n"] for entry in ours if "n" in entry.body] == list(range(self.said))
        ids = [entry.id for entry in entries]
        assert ids == sorted(set(ids))


def _parse(entry_id: bytes) -> tuple[int, int]:
    ms, _, n = entry_id.decode().partition("-")
    return int(ms), int(n)


@pytest.fixture
async def proxied(server: EmbeddedServer, redis_url: str) -> AsyncIterator[Line]:
    async with Proxy(server.port) as proxy, Redis.from_url(proxy.url) as ours, Redis.from_url(redis_url) as straight:
        agx.configure(agx.Config(redis=ours, lease_ttl=3.0))
        yield Line(proxy, straight)
        await agx.aclose()


@pytest.fixture
async def line(proxied: Line) -> Line:
    await agx.start(1, 1, "s")
    await proxied.say()
    await wait_until(proxied.arrived)
    return proxied


async def test_a_lost_reply_repeats_nothing(line: Line) -> None:
    """The server has appended the batch; the same ids again are refused, and what is there counts."""
    for _ in range(10):
        line.proxy.lose_replies()
        await line.say(3)
        await wait_until(line.arrived)
        await wait_until(lambda: line.proxy.replies_to_lose == 0)
    line.check(await line.settled())


async def test_cut_connections_lose_nothing(line: Line) -> None:
    for _ in range(10):
        await line.say(5)
        line.proxy.cut()
        await line.say(5)
    line.check(await line.settled())


async def test_an_outage_is_waited_out(line: Line) -> None:
    line.proxy.refuse()
    before = await line.read()
    await line.say(300)  # more than one batch
    assert await line.read() == before
    line.proxy.accept()
    line.check(await line.settled())


async def test_a_refused_id_goes_above_who_took_it(line: Line) -> None:
    """Somebody's entry lies in our future: its id is above all that our clock gives."""
    ahead = await line.intrude(id=f"{(await line.read())[-1].id[0] + 60_000}-5")
    await line.say(3)
    entries = await line.settled()
    line.check(entries)
    assert all(entry.id > ahead for entry in entries if entry.body.get("n", 0) > 0)


async def test_entries_of_others_stand_between(line: Line) -> None:
    intruded = []
    for _ in range(20):
        await line.say()
        intruded.append(await line.intrude())
    entries = await line.settled()
    line.check(entries)
    assert [entry.id for entry in entries if "seq" not in entry.body] == intruded


async def test_a_lost_reply_with_anothers_entry_behind(line: Line) -> None:
    """The resend is refused by somebody's entry, not by our own; ours is found below it all the same."""
    line.proxy.lose_replies(1_000)
    await line.say(3)
    await wait_until(line.arrived)
    await line.intrude()
    line.proxy.lose_replies(0)
    line.check(await line.settled())


@pytest.mark.parametrize("type", ["begin", "end"])
async def test_another_run_fences(line: Line, type: str) -> None:
    """A `begin`, or an `end` that we did not write, ends our run: nothing of ours comes behind it."""
    await line.intrude(type)
    before = await line.read()
    await line.say(3)
    await agx.stop(1, 1, "s")
    assert await line.read() == before


async def test_a_lost_reply_and_another_run_fence(line: Line) -> None:
    line.proxy.lose_replies(1_000)
    await line.say(3)
    await wait_until(line.arrived)
    await line.intrude("begin", maxlen=1, approximate=False)
    before = await line.read()
    line.proxy.lose_replies(0)
    await line.say(3)
    await agx.stop(1, 1, "s")
    assert await line.read() == before


async def test_the_begin_itself_may_lose_its_reply(proxied: Line) -> None:
    """`start()` asks again; what it finds is its own."""
    await agx.is_live(1, 1, "s")  # connected
    for _ in range(5):
        proxied.proxy.lose_replies()
        await agx.start(1, 1, "s")
        entries = await proxied.read()
        assert [(entry.type, entry.body["seq"]) for entry in entries] == [("begin", 0)]
        await agx.stop(1, 1, "s")


@pytest.mark.parametrize("seed", range(4))
async def test_any_mixture_of_faults(line: Line, seed: int) -> None:
    dice = random.Random(seed)
    intruded = 0
    for _ in range(60):
        await line.say(dice.randrange(4))
        match dice.choice(["cut", "lose", "intrude", "ahead", "pause", "pause"]):
            case "cut":
                line.proxy.cut()
            case "lose":
                line.proxy.lose_replies()
            case "intrude":
                await line.intrude()
                intruded += 1
            case "ahead":
                await line.intrude(id=f"{(await line.read())[-1].id[0] + 1_000}-7")
                intruded += 1
            case "pause":
                await asyncio.sleep(0)
    entries = await line.settled()
    line.check(entries)
    assert sum("seq" not in entry.body for entry in entries) == intruded


async def test_a_runs_text_is_whole_through_all_of_it(proxied: Line) -> None:
    """Deltas that wait out trouble are merged, so fewer entries come, and every word."""
    words = [f"word{n} " for n in range(2_000)]

    async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        for n, word in enumerate(words):
            if n % 150 == 75:
                proxied.proxy.cut()
            elif n % 150 == 0:
                proxied.proxy.lose_replies()
            await asyncio.sleep(0)
            yield word

    agent: Agent[ScopeDeps, str] = Agent(FunctionModel(stream_function=speak), deps_type=ScopeDeps)
    result = await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps())
    entries = await proxied.read()
    assert result.output == "".join(words)
    assert entries[-1].type == "end"
    proxied.check(entries)
    said = (entry.body for entry in entries if entry.body.get("part_kind") == "text")
    assert "".join(body.get("content_delta", body.get("content", "")) for body in said) == result.output


class RecordingSender:
    """A session that records each `send()`."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def send(self) -> int:
        self._log.append(self._name)
        return 0


async def test_a_batch_that_can_wait_is_sent_later_but_is_sent() -> None:
    sent: list[str] = []
    commit = GroupCommit(Supervisor())
    patient, joined, usual = (RecordingSender(name, sent) for name in ("patient", "joined", "usual"))
    for session in (patient, joined):
        commit.schedule(session, "later")
    commit.schedule(usual, "soon")
    commit.schedule(joined, "soon")
    await wait_until(lambda: len(sent) == 2)
    assert set(sent) == {"usual", "joined"}
    await wait_until(lambda: "patient" in sent)
    commit.schedule(patient, "now")
    await wait_until(lambda: sent.count("patient") == 2)
    commit.close()


async def test_a_batch_for_now_is_sent_alone_and_the_others_merge_until_the_next_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agx.stream.group_commit._SHORT", 0.2)
    sent: list[str] = []
    commit = GroupCommit(Supervisor())
    first, second, at_once = (RecordingSender(name, sent) for name in ("first", "second", "at once"))
    commit.schedule(first, "soon")  # after a pause: at once
    await asyncio.sleep(0)
    assert sent == ["first"]
    commit.schedule(second, "soon")
    commit.schedule(at_once, "now")
    await wait_until(lambda: len(sent) == 2)
    assert sent[1] == "at once"
    await wait_until(lambda: sent[2:] == ["second"])
    commit.schedule(first, "soon")
    commit.schedule(first, "now")
    await wait_until(lambda: len(sent) == 4)
    commit.close()


async def test_a_run_counts_as_followed_while_a_listener_is_subscribed(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agx.stream.writer._FIRST_LISTENER", 0.0)
    gates = [Gate(), Gate(), Gate()]
    model = scripted(["one", gates[0], " two", gates[1], " three", gates[2], " four"])
    running = asyncio.create_task(agx.run(FakeSession(), Agent(model), "hi", deps=ScopeDeps()))
    await gates[0].reached.wait()
    (events,) = current_engine().sessions.values()
    assert isinstance(events, RunEvents)
    writer = events.writer
    assert writer is not None
    await wait_until(lambda: not writer._is_followed)
    delivered: list[Any] = []

    async def follow() -> None:
        async for event in agx.listen(1, 1, "s", serialize=False):
            delivered.append(event)  # noqa: PERF401 - it is looked at meanwhile

    following = asyncio.create_task(follow())
    await wait_until(lambda: delivered)
    gates[0].open.set()
    await wait_until(lambda: writer._is_followed)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    for gate in gates[1:]:
        gate.open.set()
    result = await running
    assert result.output == "one two three four"
    replayed = [event["body"]["seq"] async for event in agx.listen(1, 1, "s", serialize=False)]
    assert replayed == list(range(len(replayed)))


@pytest.mark.parametrize("compares", [True, False])
async def test_a_retry_that_waits_sends_no_batch_twice(
    line: Line, monkeypatch: pytest.MonkeyPatch, compares: bool
) -> None:
    """A comparison has failed; by the time of its retry a batch is in flight. Its second reply would be the next's."""
    (writer,) = current_engine().write_side.streams.writers
    assert isinstance(writer, SessionWriter)
    compare, append = StreamTail.compare, StreamTail.append
    sent: list[list[StreamEntry]] = []
    retry_is_over = asyncio.Event()

    async def fail(*_: object) -> bool:
        raise RedisConnectionError("cut")

    def send(tail: StreamTail, entries: list[StreamEntry]) -> asyncio.Future[Reply]:
        sent.append(list(entries))
        return asyncio.ensure_future(reply_late(append(tail, entries)))

    async def reply_late(reply: asyncio.Future[Reply]) -> Reply:
        await retry_is_over.wait()
        return await reply

    monkeypatch.setattr(StreamTail, "compare", fail)
    monkeypatch.setattr(Backoff, "next", lambda _: 0.1)
    writer.check_owner()
    await wait_until(lambda: writer._retry)
    monkeypatch.setattr(StreamTail, "compare", compare)
    monkeypatch.setattr(StreamTail, "append", send)
    asyncio.get_running_loop().call_later(0.2, retry_is_over.set)
    if compares:
        writer.check_owner()
        await wait_until(lambda: writer._comparing is None)
    await line.say()
    await retry_is_over.wait()
    assert len(sent) == 1
    line.check(await line.settled())
