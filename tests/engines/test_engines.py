"""The whole runtime, and the sidecar, on a cluster, behind Sentinel, and on Redis 7.0 with TLS and ACL."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.replica import Replica
from support.topologies import Topology
from support.waiting import wait_until

import agx
from agx.testing import collect


async def test_run_streams_and_is_listened_to(topology: Topology) -> None:
    # Many sessions, so that every node of a cluster has some.
    sessions = [f"s{n}" for n in range(12)]
    runs = [
        asyncio.create_task(agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps(session_id=name)))
        for name in sessions
    ]
    heard = await asyncio.gather(*(collect(1, 1, name) for name in sessions))
    for result in await asyncio.gather(*runs):
        assert result.output == "one two three"
    for events in heard:
        assert [event["body"]["seq"] for event in events] == list(range(len(events)))
        assert "".join(event["body"].get("content_delta", "") for event in events).endswith("three")


async def test_cancel_q_and_is_live(topology: Topology) -> None:
    stages = {f"s{n}": ScriptedAgent(hold_after=2) for n in range(4)}
    runs = {
        name: asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", deps=ScopeDeps(session_id=name)))
        for name, stage in stages.items()
    }
    for stage in stages.values():
        await stage.reached.wait()
    assert {found async for found in agx.q(1, 1)} == {(1, 1, name) for name in stages}
    assert await agx.is_live(1, 1, "s0")

    assert all(await asyncio.gather(*(agx.cancel(1, 1, name) for name in stages)))
    for run in runs.values():
        with pytest.raises(agx.AgxCanceledError):
            await run
    assert not await agx.is_live(1, 1, "s0")
    assert [found async for found in agx.q(1, 1)] == []


async def test_start_add_stop_and_sse(topology: Topology) -> None:
    await agx.start(1, 1, "by-hand")
    frames = agx.sse(1, 1, "by-hand")
    assert '"type":"begin"' in await anext(frames)
    await agx.add(1, 1, "by-hand", type="info", origin="me", body={"note": 1})
    assert '"note":1' in await anext(frames)
    await agx.stop(1, 1, "by-hand")
    assert '"type":"end"' in await anext(frames)
    with pytest.raises(StopAsyncIteration):
        await anext(frames)
    assert not await agx.is_live(1, 1, "by-hand")


async def test_a_listener_hears_of_an_event_at_once(topology: Topology) -> None:
    """The wake-up comes from whichever node has the stream; without it a listener would look once a second."""
    loop = asyncio.get_running_loop()
    delays = []
    for name in ("a", "b", "c", "d", "e"):
        await agx.start(1, 1, name)
        events = agx.listen(1, 1, name, serialize=False)
        await anext(events)
        for _ in range(5):
            following = asyncio.ensure_future(anext(events))
            # The feed is asleep by now: its next entry needs a wake-up.
            await agx.is_live(1, 1, name)
            sent = loop.time()
            await agx.add(1, 1, name, type="info", origin="me")
            await following
            delays.append(loop.time() - sent)
        await events.aclose()
        await agx.stop(1, 1, name)
    assert sorted(delays)[len(delays) // 2] < 0.5, delays


async def test_sidecar_counts_the_runs(topology: Topology, tmp_path: Path) -> None:
    scopes = ("one", "two", "three")
    for name in scopes:
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps(scope=name))
    sidecar = Replica(tmp_path / "sidecar", **topology.environment)
    try:
        await wait_until(
            lambda: asyncio.to_thread(
                lambda: [sidecar.scrape().total("agx_runs_total", scope=name) for name in scopes] == [1, 1, 1]
            )
        )
    finally:
        assert sidecar.end() == 0, sidecar.log
    assert "Traceback" not in sidecar.log
