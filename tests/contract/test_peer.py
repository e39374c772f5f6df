"""PyPI `pydantic-ai-stream` 0.1.1, the owner of the wire format: its clients on our runs, and ours on its runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pydantic_ai_stream as peer
import pytest
from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai_stream.deps import Deps as PeerDepsBase
from pydantic_ai_stream.session import Session as PeerSessionBase
from redis.asyncio import Redis
from support.agents import Gate, ScopeDeps, call, scripted
from support.recorded import check_seq, of_kind, read_facts, read_stream, text_of

import agx
from agx.error_codes import RUN_FAILED
from agx.facts.schema import RunEnded
from agx.testing import MemorySession

STREAM = "pyaix:1:1:s"


@dataclass(kw_only=True)
class PeerDeps(PeerDepsBase):
    def get_scope_id(self) -> int:
        return 1


@dataclass(kw_only=True)
class PeerSession(PeerSessionBase):
    async def load(self) -> None:
        pass

    async def save(self) -> None:
        pass


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    """Both on one server and one prefix; a short lease, since the peer's cancel is noticed at a renewal."""
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(client, key_prefix="pyaix", lease_ttl=0.9))
        yield client
        await agx.aclose()
        # The peer's live key has no TTL; its runs here all end, but a test that fails may leave one.
        await client.delete(f"{STREAM}:live")


def peer_deps(client: Redis) -> PeerDeps:
    return PeerDeps(redis=client, user_id=1, session_id="s")


def peer_run(client: Redis, model: Model) -> asyncio.Task[None]:
    agent = Agent(model, deps_type=PeerDeps)
    return asyncio.create_task(peer.run(PeerSession(), agent, "hi", peer_deps(client)))


def adding(*after: Any) -> Agent[ScopeDeps, str]:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("add", '{"a": 1, ', '"b": 2}')], ["th", "ree", *after]), deps_type=ScopeDeps
    )

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    return agent


def our_run(agent: Agent[ScopeDeps, str]) -> asyncio.Task[Any]:
    return asyncio.create_task(agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps()))


async def test_its_listener_reads_our_run(client: Redis) -> None:
    running = our_run(adding())
    events = [event async for event in peer_deps(client).listen(serialize=False)]
    await running
    bodies = [event["body"] for event in events if isinstance(event, dict)]
    assert "".join(b.get("content_delta", "") or b.get("content", "") for b in bodies if _is_text(b)) == "three"
    assert [b["args"] for b in bodies if b.get("part_kind") == "tool-call"] == [{"a": 1, "b": 2}]
    assert [b["content"] for b in bodies if b.get("part_kind") == "tool-return"] == [3]
    assert [b["event"] for b in bodies if b.get("event") in ("llm-begin", "llm-end", "answer")] == [
        *("llm-begin", "llm-end", "llm-begin", "answer", "llm-end")
    ]
    assert [b["part_delta_kind"] for b in bodies if b.get("event") == "part_delta"]
    check_seq(await read_stream(client, STREAM))


def _is_text(body: dict[str, Any]) -> bool:
    # The peer's deltas name their kind `part_delta_kind`.
    return "text" in (body.get("part_delta_kind"), body.get("part_kind"))


async def test_its_q_finds_our_run(client: Redis) -> None:
    gate = Gate()
    running = our_run(adding(gate))
    await gate.reached.wait()
    assert [found async for found in peer.q(client, 1, 1)] == [(1, 1, "s")]
    assert await peer_deps(client).is_live()
    gate.open.set()
    await running
    assert [found async for found in peer.q(client, 1, 1)] == []
    assert not await peer_deps(client).is_live()


async def test_its_cancel_stops_our_run_within_a_renewal(client: Redis) -> None:
    gate = Gate()
    running = our_run(adding(gate))
    await gate.reached.wait()
    assert await peer_deps(client).cancel() is True
    with pytest.raises(agx.AgxCanceledError) as caught:
        await running
    assert caught.value.reason == "lease_deleted"
    assert "three" in str(caught.value.messages[-1])
    entries = await read_stream(client, STREAM)
    check_seq(entries)
    assert (entries[-2].type, entries[-2].body["msg"]) == ("error", "canceled")
    assert (entries[-1].body["outcome"], entries[-1].body["reason"]) == ("cancelled", "lease_deleted")
    (end,) = of_kind(RunEnded, await read_facts(client, "pyaix"))
    assert (end.outcome, end.reason, end.stage) == ("cancelled", "lease_deleted", "model_request")
    assert not await client.exists(f"{STREAM}:live")


async def test_its_listener_sees_our_cancel_and_our_failure_as_its_own(client: Redis) -> None:
    gate = Gate()
    running = our_run(adding(gate))
    await gate.reached.wait()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    events = [event async for event in peer_deps(client).listen(serialize=False)]
    assert isinstance(events[-1], dict)
    assert (events[-1]["type"], events[-1]["body"]["msg"]) == ("error", "canceled")
    with pytest.raises(ZeroDivisionError):
        await our_run(adding(ZeroDivisionError("by zero")))
    events = [event async for event in peer_deps(client).listen(serialize=False)]
    assert isinstance(events[-1], dict)
    assert (events[-1]["type"], events[-1]["body"]["msg"]) == ("error", RUN_FAILED.sentence)


async def test_our_listener_reads_its_run_as_it_goes(client: Redis) -> None:
    gate = Gate()
    seen: list[dict[str, Any]] = []
    running = peer_run(client, scripted(["one", " two", gate, " three"]))
    async for event in agx.listen(1, 1, "s", serialize=False):
        seen.append(event)
        if event["body"].get("content_delta") == " two":
            gate.open.set()  # it sends no wake-ups: read all the same, while the run still goes on
    await running
    assert (seen[0]["type"], seen[0]["body"]) == ("begin", {"session_id": "s"})
    assert (seen[-1]["type"], seen[-1]["body"]) == ("end", {})
    texts = [e["body"].get("content", "") + e["body"].get("content_delta", "") for e in seen]
    assert "".join(texts) == "one two three"
    assert [e.name for e in await read_stream(client, STREAM)] == [
        e["body"].get("event", e["type"]) if e["type"] == "event" else e["type"] for e in seen
    ]


async def test_our_cancel_stops_its_run_at_its_next_node(client: Redis) -> None:
    gate = Gate()
    running = peer_run(client, scripted(["one", gate, " two"]))
    await gate.reached.wait()
    assert await agx.is_live(1, 1, "s")
    assert await agx.cancel(1, 1, "s") is True
    assert not await agx.is_live(1, 1, "s")
    gate.open.set()
    with pytest.raises(peer.AgxCanceledError):
        await running
    seen = [event async for event in agx.listen(1, 1, "s", serialize=False)]
    assert [e["type"] for e in seen[-2:]] == ["error", "end"]
    assert await agx.cancel(1, 1, "s") is False


async def test_two_runs_of_both_kinds_do_not_meet_in_one_session(client: Redis) -> None:
    gate = Gate()
    running = peer_run(client, scripted(["one", gate]))
    await gate.reached.wait()
    with pytest.raises(agx.SessionBusyError):
        await our_run(adding())
    gate.open.set()
    await running
    assert (await our_run(adding())).output == "three"
    entries = await read_stream(client, STREAM)
    check_seq(entries)
    assert entries[0].body["seq"] == 0  # the stream holds the latest run
    assert text_of(entries) == "three"


async def test_its_add_between_our_events_takes_no_seq(client: Redis) -> None:
    gate = Gate()
    running = our_run(adding(gate, " more"))
    await gate.reached.wait()
    for n in range(3):
        await peer_deps(client).add_info({"n": n})
    gate.open.set()
    await running
    entries = await read_stream(client, STREAM)
    check_seq(entries)
    assert [e.body["n"] for e in entries if e.type == "info"] == [0, 1, 2]
    assert not [e for e in entries if e.type == "info" and "seq" in e.body]
    assert text_of(entries) == "three more"
    assert entries[-1].type == "end"
