"""Whose stream it is (contract, section 4): a process that stalled neither replaces another's stream nor writes on."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.leaks import leak_checked
from support.recorded import read_recorded
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.engine.lease import Lease
from agx.engine.leases import Leases
from agx.engine.registry import current_engine
from agx.facts import schema as facts
from agx.redis import keys
from agx.redis.bus import NodeBus, Script
from agx.redis.live_key import RENEW
from agx.stream.append_scripts import BEGIN

SESSION = keys.SessionKeys.of("agx", 1, 1, "s")
LEASE = 0.6  # seconds


async def _read(redis: Redis) -> list[tuple[bytes, bytes]]:
    """Return type and body of each entry."""
    entries: Any = await redis.xrange(SESSION.stream)
    return [(fields[b"type"], fields[b"body"]) for _, fields in entries]


async def _append(redis: Redis, type: str, run_id: str) -> None:
    body = f'{{"run_id": "{run_id}"}}'
    await redis.xadd(SESSION.stream, {"type": type, "origin": "opale", "body": body})
    await redis.expire(SESSION.stream, 60)


async def test_a_stall_before_begin_replaces_no_stream(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process stalls between its check of the lease and its `begin`; meanwhile another run begins."""
    ensure = Leases.ensure
    stalls = iter([True])

    async def ensure_then_stall(self: Leases, lease: Lease, renew: bool = False) -> int:
        until_ms = await ensure(self, lease, renew)
        if next(stalls, False):
            await configured.set(SESSION.live, "another", px=60_000)
            await _append(configured, "begin", "another")
            lease.confirmed = float("-inf")  # as after a stall longer than the lease
        return until_ms

    monkeypatch.setattr(Leases, "ensure", ensure_then_stall)
    with pytest.raises(agx.SessionBusyError):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    assert [body for _, body in await _read(configured)] == [b'{"run_id": "another"}']
    assert await configured.get(SESSION.live) == b"another"


async def test_a_run_has_a_deadline_before_it_has_a_begin(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between the two would leave a run that no recovery finds."""
    run, answer = NodeBus.run, asyncio.Event()
    held: list[str] = []

    def answer_late(self: NodeBus, script: Script, key: str, *args: Any) -> asyncio.Future[Any]:
        reply = run(self, script, key, *args)
        if not key.startswith("agx::leases:"):
            return reply
        held.append(key)

        async def wait() -> Any:
            await answer.wait()
            return await reply

        return asyncio.ensure_future(wait())

    monkeypatch.setattr(NodeBus, "run", answer_late)
    running = asyncio.create_task(agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps()))
    await wait_until(lambda: configured.exists(SESSION.live), what="the lease is taken")
    for _ in range(20):
        await configured.ping()
        assert await _read(configured) == []
    assert held
    answer.set()
    await running
    assert (await _read(configured))[-1][0] == b"end"


async def test_a_begin_that_arrives_late_gets_a_deadline_again(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent in time. Before it arrived, recovery had looked at the run and removed its deadline."""
    agx.configure(agx.Config(redis=configured, lease_ttl=LEASE))
    run, stalls = NodeBus.run, iter([True])

    def stall(self: NodeBus, script: Script, key: str, *args: Any) -> asyncio.Future[Any]:
        if script is not BEGIN or not next(stalls, False):
            return run(self, script, key, *args)

        async def arrive_late() -> Any:
            await wait_until(lambda: _is_past_deadline(configured), what="its deadline passes")
            await configured.delete(SESSION.live)
            for leases in await configured.keys("agx::leases:*"):
                await configured.delete(leases)
            return await run(self, script, key, *args)

        return asyncio.ensure_future(arrive_late())

    monkeypatch.setattr(NodeBus, "run", stall)
    monkeypatch.setattr(Leases, "_renew_once", _renew_later)
    scripted = ScriptedAgent(hold_after=1)
    running = asyncio.create_task(agx.run(FakeSession(), scripted.agent(), "Hi", deps=ScopeDeps()))
    await scripted.reached.wait()
    assert [kind for kind, _ in await _read(configured)].count(b"begin") == 1
    assert [await configured.zcard(key) for key in await configured.keys("agx::leases:*")] == [1]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def _renew_later(self: Leases) -> float:
    return LEASE


async def _is_past_deadline(client: Redis) -> bool:
    seconds, micros = await client.time()
    now_ms = seconds * 1_000 + micros // 1_000
    keys = await client.keys("agx::leases:*")
    return any([await client.zcount(key, 0, now_ms) for key in keys])


async def test_a_session_that_is_entered_late_leaves_its_index(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry and its removal have connections of their own, of which one may be behind."""
    run, goes_on = NodeBus.run, asyncio.Event()

    def enter_late(self: NodeBus, script: Script, key: str, *args: Any) -> asyncio.Future[Any]:
        if key != SESSION.index:
            return run(self, script, key, *args)

        async def enter() -> Any:
            await goes_on.wait()
            return await run(self, script, key, *args)

        return asyncio.ensure_future(enter())

    monkeypatch.setattr(NodeBus, "run", enter_late)
    running = asyncio.create_task(agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps()))

    async def has_end() -> bool:
        entries = await _read(configured)
        return bool(entries) and entries[-1][0] == b"end"

    await wait_until(has_end)
    for _ in range(50):
        await configured.ping()  # the fact of the end, and what follows it
    goes_on.set()
    await running
    for _ in range(5):
        await configured.ping()
    assert not await configured.zcard(SESSION.index)


async def test_a_busy_session_keeps_no_deadline_of_a_refused_run(configured: Redis) -> None:
    await configured.set(SESSION.live, "another", px=60_000)
    await _append(configured, "begin", "another")
    with pytest.raises(agx.SessionBusyError):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    await wait_until(lambda: _has_no_deadline(configured), what="the refused run's deadline is removed")


async def _has_no_deadline(redis: Redis) -> bool:
    return not any([await redis.zcard(keys.leases("agx", n)) for n in range(8)])


async def test_a_stall_before_begin_while_nobody_came(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease expired, and another run came and went: the run takes the lease again and begins."""
    ensure = Leases.ensure
    stalls = iter([True])

    async def ensure_then_stall(self: Leases, lease: Lease, renew: bool = False) -> int:
        until_ms = await ensure(self, lease, renew)
        if next(stalls, False):
            await configured.delete(SESSION.live)
            await _append(configured, "end", "before")
            lease.confirmed = float("-inf")
        return until_ms

    monkeypatch.setattr(Leases, "ensure", ensure_then_stall)
    result = await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    assert result.output == "one two three"
    types = [entry[0] for entry in await _read(configured)]
    assert (types[0], types[-1]) == (b"begin", b"end")


async def test_a_silent_run_whose_stream_was_ended_meanwhile_stops(server: EmbeddedServer) -> None:
    """A recovery ended the stream while the process stalled: the run stops when it takes its lease again."""
    with leak_checked(server.url) as url:
        async with Redis.from_url(url) as redis:
            agx.configure(agx.Config(redis=redis, lease_ttl=LEASE))
            model = ScriptedAgent(hold_after=1)
            running = asyncio.create_task(agx.run(FakeSession(), model.agent(), "Hi", deps=ScopeDeps()))
            await asyncio.wait_for(model.reached.wait(), 10)

            async def claim_expires_soon() -> bool:
                remaining: Any = await redis.pttl(SESSION.live)
                return bool(remaining < LEASE * 1_000)

            # Long enough that the lease expires, and that no entry is retained any longer.
            await redis.set(SESSION.live, "reaper:1", px=int(LEASE * 3_000))
            await wait_until(claim_expires_soon)
            assert not running.done()
            await _append(redis, "end", orjson.loads((await _read(redis))[0][1])["run_id"])
            with pytest.raises(agx.LeaseLostError):
                await asyncio.wait_for(running, 10)
            await agx.aclose()


@pytest.mark.parametrize(("field", "value"), [("type", "a\ud800b"), ("origin", "a\ud800b"), ("origin", 7)])
async def test_a_type_or_origin_that_redis_cannot_store(configured: Redis, field: str, value: object) -> None:
    """It is refused at once; on its way to Redis it would hold up all entries behind it."""
    await agx.start(1, 1, "s")
    labels = {"type": "info", "origin": "test"} | {field: value}
    with pytest.raises((TypeError, ValueError), match=f"an event's {field} must be"):
        await agx.add(1, 1, "s", body={}, **labels)  # type: ignore[arg-type]
    await agx.stop(1, 1, "s")
    types = [entry[0] for entry in await _read(configured)]
    assert types == [b"begin", b"end"]


async def test_a_tool_that_raises_a_stray_cancellation_has_failed(configured: Redis) -> None:
    """Nobody cancelled the run: the tool awaited something that was cancelled elsewhere."""
    stage = ScriptedAgent(call_tool=True, tool_error=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await agx.run(FakeSession(), stage.agent(), "Hi", deps=ScopeDeps())
    recorded = await read_recorded(configured)
    assert [fact.outcome for fact in recorded.facts if isinstance(fact, facts.ToolEnded)] == ["error"]


async def acquire_lease() -> tuple[Lease, list[Any]]:
    """Return a lease that is held, and a list that gets an item when its run is cancelled or fenced."""
    engine = current_engine()
    await engine.ready()
    cancelled: list[Any] = []
    lease = Lease(SESSION, "r", lambda *how: cancelled.append(how), lambda: cancelled.append("lost"))
    await engine.leases.acquire(lease)
    return lease, cancelled


async def test_a_renewal_that_is_older_than_the_lease_cancels_nothing(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis pauses until the lease has expired; it is taken again before the reply of a renewal is looked at."""
    engine = current_engine()
    lease, cancelled = await acquire_lease()
    assert lease.index_entry is not None
    await lease.index_entry
    await configured.delete(SESSION.live)
    run = engine.control.run

    def reply_late(script: Script, *args: Any) -> Any:
        async def late() -> Any:
            found = await run(script, *args)
            await engine.leases.acquire(lease)
            return found

        return asyncio.ensure_future(late()) if script is RENEW else run(script, *args)

    monkeypatch.setattr(engine.control, "run", reply_late)
    await engine.leases.renew(lease)
    assert cancelled == []
    assert await configured.get(SESSION.live) == b"r"
    await engine.leases.release(lease)


async def test_a_loss_of_data_while_the_index_is_refreshed_cancels_nothing(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline and the session are written after the loss, so they do not prove that only the lease was deleted."""
    engine = current_engine()
    lease, cancelled = await acquire_lease()
    run, losses = engine.control.run, 0

    def lose_data(script: Script, *args: Any) -> Any:
        async def renew_before() -> Any:
            nonlocal losses
            found = await run(script, *args)
            if not losses:
                losses += 1
                await configured.flushdb()
            return found

        return asyncio.ensure_future(renew_before()) if script is RENEW else run(script, *args)

    monkeypatch.setattr(engine.control, "run", lose_data)
    engine.leases.refresh_soon()
    await engine.leases._renew_once()
    assert losses == 1
    await engine.leases._renew_once()
    assert cancelled == []
    assert await configured.get(SESSION.live) == b"r"
    await engine.leases.release(lease)
