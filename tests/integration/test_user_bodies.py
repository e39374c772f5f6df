"""Bodies of `add()` and `add_info()` are their user's: never read, never changed (contract, section 4)."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, call, scripted
from support.recorded import check_seq, read_stream

import agx
from agx.listeners.replay import replay
from agx.listeners.replayed_run import InfoEvent
from agx.stream.entry import StreamEntry

BODIES: list[dict[str, Any]] = [
    {"seq": 42},
    {"seq": "step-1", "n": 2**60},
    {"seq": None},
    {"gap": True, "superseded_by": "v2"},
    {"stamp": 1, "prompt": 2},
]


@pytest.fixture
async def ended_run(configured: Redis) -> None:
    """A run whose tool has added all the bodies."""
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("add")], ["done"]), deps_type=ScopeDeps)

    @agent.tool
    async def add(ctx: RunContext[ScopeDeps]) -> str:
        for body in BODIES:
            await ctx.deps.add_info(body)
        await ctx.deps.add_info({"approvals": {"c9": "delete"}}, origin="deferred")
        await ctx.deps.add_info({"prompt": "Not mine", "after": 0, "stamp": "x"}, origin="prompt")
        return "added"

    await agx.run(FakeSession(), agent, "Go", ScopeDeps())


async def infos(**kwargs: Any) -> list[dict[str, Any]]:
    events = [event async for event in agx.listen(1, 1, "s", serialize=False, **kwargs)]
    assert events[-1]["type"] == "end"
    return [event["body"] for event in events if event["type"] == "info"]


async def test_listeners_get_them_as_they_were_added(configured: Redis, ended_run: None) -> None:
    found = await infos()
    assert found[:3] == BODIES[:3]
    # A body without `seq` gets the run's, as every other body does.
    assert [{name: body[name] for name in body if name != "seq"} for body in found[3:5]] == BODIES[3:5]


async def test_the_run_s_own_numbers_have_no_gap(configured: Redis, ended_run: None) -> None:
    entries = await read_stream(configured)
    check_seq(entries)
    assert all(entry.seq is not None for entry in entries)
    parsed = [StreamEntry.of(entry_id, fields) for entry_id, fields in await raw_entries(configured)]
    assert [entry.seq for entry in parsed] == list(range(len(parsed)))


async def raw_entries(client: Redis) -> list[tuple[bytes, list[bytes]]]:
    found: list[tuple[bytes, list[bytes]]] = []
    for entry_id, fields in await client.xrange("agx:1:1:s"):
        flat = [value if isinstance(value, bytes) else str(value).encode() for pair in fields.items() for value in pair]
        found.append((entry_id if isinstance(entry_id, bytes) else str(entry_id).encode(), flat))
    return found


async def test_a_replay_shows_them_and_reads_nothing_in_them(configured: Redis, ended_run: None) -> None:
    events = [event async for event in replay(1, 1, "s")]
    shown = [event.to_payload() for event in events if isinstance(event, InfoEvent)]
    assert shown == [
        *BODIES,
        {"approvals": {"c9": "delete"}},
        {"prompt": "Not mine", "after": 0, "stamp": "x"},
    ]
    frames = [frame async for frame in agx.sse(1, 1, "s")]
    assert not any(frame.startswith("id: 0\n") for frame in frames)


async def test_from_another_process_they_have_no_number(configured: Redis) -> None:
    await agx.start(1, 1, "s")
    await agx.add(1, 1, "s", type="info", origin="opale", body={"seq": 1})
    await agx.stop(1, 1, "s")
    await agx.add(1, 1, "s", type="info", origin="opale", body={"seq": 7})
    entries = await read_stream(configured)
    assert [(entry.seq, entry.body.get("seq")) for entry in entries] == [(0, 0), (1, 1), (2, 2), (None, 7)]


@pytest.mark.parametrize("kind", ["begin", "end", "resume"])
async def test_what_only_a_run_appends_is_refused(configured: Redis, kind: str) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("add")], ["done"]), deps_type=ScopeDeps)

    @agent.tool_plain
    async def add() -> str:
        with pytest.raises(ValueError, match=kind):
            await agx.add(1, 1, "s", type=kind, origin="opale", body={"run_id": "x"})
        return "refused"

    assert (await agx.run(FakeSession(), agent, "Go", ScopeDeps())).output == "done"
    assert [entry.type for entry in await read_stream(configured)].count(kind) == (kind != "resume")
