"""Any asyncio client of redis-py is taken, on each server that agx claims; its own pool is never used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic_ai import Agent
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from support.agents import Gate, ScopeDeps, call, scripted
from support.recorded import check_seq, of_kind, read_facts, read_stream, text_of
from support.waiting import wait_until

import agx
from agx.facts.schema import RunEnded
from agx.testing import MemorySession, collect


def make_agent(gate: Gate) -> Agent[ScopeDeps, str]:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("echo", '{"text": "é"}')], ["one", gate, " two"]), deps_type=ScopeDeps
    )

    @agent.tool_plain
    def echo(text: str) -> str:
        return text

    return agent


async def test_every_operation_with_any_client(any_client: Redis) -> None:
    agx.configure(agx.Config(any_client))
    gate = Gate()
    running = asyncio.create_task(agx.run(MemorySession(id="s"), make_agent(gate), "hi", deps=ScopeDeps()))
    listening = asyncio.create_task(collect(1, 1, "s"))
    await gate.reached.wait()
    assert await agx.is_live(1, 1, "s")
    assert [found async for found in agx.q(1, 1)] == [(1, 1, "s")]
    await agx.add(1, 1, "s", type="info", origin="mine", body={"n": 1})
    gate.open.set()
    assert (await running).output == "one two"
    entries = await read_stream(any_client)
    check_seq(entries)
    assert text_of(entries) == "one two"
    assert [event["id"] for event in await listening] == [entry.id for entry in entries]
    resumed = [e["id"] async for e in agx.listen(1, 1, "s", after=entries[3].id, serialize=False)]
    assert resumed == [entry.id for entry in entries[4:]]
    assert (await read_run_end(any_client)).outcome == "completed"

    gate = Gate()
    running = asyncio.create_task(agx.run(MemorySession(id="s"), make_agent(gate), "hi", deps=ScopeDeps()))
    await gate.reached.wait()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    await agx.start(1, 1, "s")
    await agx.stop(1, 1, "s")
    assert [event["type"] for event in await collect(1, 1, "s")] == ["begin", "end"]

    kept = agx.RedisSession(1, 1, "kept")
    await agx.run(kept, make_agent(_open()), "hi", deps=ScopeDeps(session_id="kept"))
    again = agx.RedisSession(1, 1, "kept")
    await again.load()
    assert again.msgs == kept.msgs
    await agx.aclose()


def _open() -> Gate:
    gate = Gate()
    gate.open.set()
    return gate


async def read_run_end(client: Redis) -> RunEnded:
    (end,) = of_kind(RunEnded, await read_facts(client))
    return end


async def _connections(client: Redis) -> int:
    clients: Mapping[str, Any] = await client.info("clients")
    return int(clients["connected_clients"])


async def _connections_are(client: Redis, count: int) -> bool:
    return await _connections(client) == count


@pytest.mark.parametrize("pool", [ConnectionPool, BlockingConnectionPool])
async def test_the_users_pool_is_never_used(redis_url: str, pool: type[ConnectionPool]) -> None:
    """One connection in the user's pool, which is taken, and fifty listeners beside a run."""
    async with Redis.from_url(redis_url) as other:
        before = await _connections(other)
        async with Redis.from_pool(pool.from_url(redis_url, max_connections=1)) as client:
            agx.configure(agx.Config(client))
            taken = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
            gate = Gate()
            running = asyncio.create_task(agx.run(MemorySession(id="s"), make_agent(gate), "hi", deps=ScopeDeps()))
            await gate.reached.wait()
            listening = [asyncio.create_task(collect(1, 1, "s")) for _ in range(50)]
            assert await agx.is_live(1, 1, "s")
            connections = await _connections(other) - before - 1
            gate.open.set()
            await running
            seen = await asyncio.gather(*listening)
            assert all(events == seen[0] for events in seen)
            assert "".join(e["body"].get("content_delta", "") for e in seen[0]) == " two"
            assert connections <= 5, f"{connections} connections for 50 listeners and a run"
            await client.connection_pool.release(taken)
            await agx.aclose()

        # A closed socket is a moment later gone for the server too.
        await wait_until(lambda: _connections_are(other, before))


async def test_a_url_with_a_database_and_a_name_is_followed(redis_url: str) -> None:
    async with Redis.from_url(f"{redis_url}?client_name=mine", db=5) as client:
        agx.configure(agx.Config(client))
        await agx.start(1, 1, "s")
        assert await client.exists("agx:1:1:s:live")
        names: list[Any] = [each["name"] for each in await client.client_list()]
        assert names.count("mine") >= 2
        await agx.stop(1, 1, "s")
        await agx.aclose()
    async with Redis.from_url(redis_url) as zero:
        assert await zero.dbsize() == 0
