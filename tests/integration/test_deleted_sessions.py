"""`agx.delete_session()`: afterwards no key of the server contains anything of the session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic_ai import Agent, DeferredToolRequests
from redis.asyncio import Redis
from support.agents import FakeSession, Gate, ScopeDeps, call, scripted
from support.run_facts import FactsOfRun
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.facts.schema import RunEnded
from agx.redis.keys import SessionKeys
from agx.redis.live_key import new_claim
from agx.redis_session import RedisSessions
from agx.testing import collect

NAME = "the-deleted-one"  # in no other key, and in no value that is not of this session
KEYS = SessionKeys.of("agx", 1, 1, NAME)
STORE = RedisSessions(ttl=60)
LEASE = 1.0


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(client, lease_ttl=LEASE))
        yield client
        await agx.aclose()


async def keys_with(client: Redis, text: str) -> set[str]:
    """Return the keys whose name or value has a text, whatever their type."""
    found = set()
    reads: dict[str, Callable[[str], Awaitable[Any]]] = {
        "string": client.get,
        "hash": client.hgetall,
        "stream": client.xrange,
        "zset": lambda key: client.zrange(key, 0, -1),
    }
    async for raw in client.scan_iter():
        key = raw.decode()
        kind = (await client.type(key)).decode()
        value = b"" if kind == "none" else await reads[kind](key)  # it has just expired
        if kind != "none" and (text in key or text.encode() in repr(value).encode()):
            found.add(key)
    return found


async def left(client: Redis) -> set[str]:
    """Return the keys that still have the session's name, without the queues of facts."""
    return {key for key in await keys_with(client, NAME) if not key.startswith("agx::queue:")}


async def is_gone(client: Redis) -> bool:
    return not await left(client)


async def delete() -> bool:
    return await agx.delete_session(1, 1, NAME, sessions=STORE)


def deps() -> ScopeDeps:
    return ScopeDeps(session_id=NAME)


async def test_all_that_is_kept_of_a_session_is_removed(client: Redis) -> None:
    """A live run that steers, one that waits in the queue, calls that wait, a branch, a listener."""
    outputs: Any = [str, DeferredToolRequests]
    asking = Agent(scripted(call("work")), deps_type=ScopeDeps, output_type=outputs)
    asking.tool_plain(lambda: "worked", name="work", requires_approval=True)
    await agx.run(STORE.open(1, 1, NAME), asking, "Hi", deps())
    assert len(await agx.pending(1)) == 1
    await agx.branch_session(1, 1, NAME, messages=1, sessions=STORE, branch_id="branch")
    gate = Gate()
    live = Agent(scripted(["half", gate]), deps_type=ScopeDeps)
    run = asyncio.create_task(agx.run(FakeSession(), live, "again", deps()))
    await gate.reached.wait()
    # Nothing takes them: the agent holds its answer, and no worker runs.
    await agx.steer(1, 1, NAME, "more", key="k")
    await agx.submit(1, 1, NAME, agent="nobody", prompt="later", on_busy="enqueue")
    await agx.submit(1, 1, "other", agent="nobody", prompt="later")
    listened = asyncio.create_task(collect(1, 1, NAME))
    await wait_until(lambda: current_engine().hub.listeners)
    assert {key.partition(":")[2].rpartition(":")[0] for key in await left(client)} >= {"1:1", ":jobs", ":leases"}

    assert await delete()
    with pytest.raises(agx.AgxCanceledError):
        await run
    assert (await listened)[-1]["body"]["outcome"] == "cancelled"
    # Listeners and the process that wrote it still compare the stream.
    assert await left(client) <= {KEYS.stream}
    assert await collect(1, 1, NAME) == [{**(await collect(1, 1, NAME))[0], "type": "end", "body": {"deleted": True}}]
    await wait_until(lambda: is_gone(client))
    assert [one.session_id for one in await STORE.list(1, 1)] == ["branch"]
    assert await client.xlen("agx::jobs:0") + await client.xlen(f"agx::jobs:{current_engine().queues.partitions}") <= 1
    assert not await agx.pending(1)
    assert not await delete()


async def test_a_process_that_wrote_the_session_does_not_bring_it_back(client: Redis) -> None:
    """It appends again what a failover has lost, so long as it retains it."""
    await agx.run(STORE.open(1, 1, NAME), Agent(scripted(["Hi"]), deps_type=ScopeDeps), "Hi", deps())
    assert await delete()
    current_engine().write_side.streams.check_all()
    (entry,) = await client.xrange(KEYS.stream)
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "agx-compare"))
    assert await client.xrange(KEYS.stream) == [entry]
    await wait_until(lambda: is_gone(client))


async def test_a_session_of_another_tenant_is_not_touched(client: Redis) -> None:
    await agx.run(STORE.open(1, 1, NAME), Agent(scripted(["Hi"]), deps_type=ScopeDeps), "Hi", deps())
    before = await left(client)
    for scope, user in ((2, 1), (1, 2)):
        assert not await agx.delete_session(scope, user, NAME, sessions=STORE)
    assert await left(client) == before


async def test_a_run_whose_process_died_is_finalized_first(client: Redis) -> None:
    """Without its last fact it would be counted as started, and never as ended."""
    gate = Gate()
    run = asyncio.create_task(
        agx.run(FakeSession(), Agent(scripted(["half", gate]), deps_type=ScopeDeps), "Hi", deps())
    )
    await gate.reached.wait()
    current_engine().leases.forget(next(iter(current_engine().leases._held.values())))
    run_id = (await client.get(KEYS.live)).decode()
    await client.delete(KEYS.live)  # as if it had expired: the process does nothing any more
    assert await delete()
    (end,) = (await FactsOfRun.read(client, run_id)).of(RunEnded)
    assert end.outcome == "lost"
    assert not any(NAME in key for key in await left(client) - {KEYS.stream})
    with pytest.raises(agx.LeaseLostError):
        await run
    await wait_until(lambda: is_gone(client))


async def test_a_run_that_does_not_end_keeps_its_conversation(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agx.jobs.deletion._EXTRA_WAIT", -LEASE)
    await agx.run(STORE.open(1, 1, NAME), Agent(scripted(["Hi"]), deps_type=ScopeDeps), "Hi", deps())
    await client.set(KEYS.live, new_claim(), px=60_000)
    with pytest.raises(agx.SessionBusyError):
        await delete()
    assert len(await STORE.list(1, 1)) == 1
    await client.delete(KEYS.live)


async def test_no_run_begins_before_all_is_removed(client: Redis) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    class Slow(RedisSessions):
        async def delete(self, *ids: Any) -> bool:
            reached.set()
            await go_on.wait()
            return await super().delete(*ids)

    deleting = asyncio.create_task(agx.delete_session(1, 1, NAME, sessions=Slow()))
    await reached.wait()
    with pytest.raises(agx.SessionBusyError):
        await agx.run(STORE.open(1, 1, NAME), Agent(scripted(["Hi"]), deps_type=ScopeDeps), "Hi", deps())
    go_on.set()
    assert not await deleting
    await agx.run(STORE.open(1, 1, NAME), Agent(scripted(["Hi"]), deps_type=ScopeDeps), "Hi", deps())


async def test_an_outage_raises_redis_unavailable(client: Redis) -> None:
    agx.configure(agx.Config(Redis(port=1)))
    with pytest.raises(agx.RedisUnavailableError):
        await delete()
    await agx.aclose()
    agx.configure(agx.Config(client))
    with contextlib.suppress(agx.AgxError):
        await delete()
