"""Connecting: whatever it raises is an outage of Redis, and nothing in it blocks the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from pydantic_ai import Agent
from redis.asyncio import Redis
from redis.credentials import CredentialProvider
from support.agents import FakeSession, Gate, ScopeDeps, complete, scripted
from support.recorded import check_seq, read_stream, text_of
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.testing import collect

DATABASE = 3
STREAM = "agx:1:1:s"


class BrokenSecretStore(CredentialProvider):
    """A credential provider whose secret store raises, for as long as it is down."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error
        self.asked = 0

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return ("default", "any")  # no password is set, so any is right


class Problems:
    """What the loop's exception handler was told: tasks whose exception nobody retrieved, failed callbacks."""

    def __init__(self) -> None:
        self.contexts: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.contexts.append(context))


@pytest.mark.parametrize("error", [KeyError("token"), asyncio.CancelledError("inner"), RuntimeError("no store")])
async def test_a_start_fails_as_without_redis(redis_url: str, error: BaseException) -> None:
    problems = Problems()
    async with Redis.from_url(redis_url, credential_provider=BrokenSecretStore(error)) as client:
        agx.configure(agx.Config(client, lease_ttl=1))
        with pytest.raises(agx.RedisUnavailableError) as raised:
            await agx.run(FakeSession(), scripted_agent(["one"]), "Hi", deps=ScopeDeps())
        assert raised.value.__cause__ is not None
        assert raised.value.__cause__.__cause__ is error
        with pytest.raises(agx.RedisUnavailableError):
            [event async for event in agx.listen(1, 1, "s", wait=0.2)]
        # A run without a session does not need Redis.
        observed = Agent(complete(scripted(["one"])), capabilities=[agx.AgxCapability()])
        assert (await observed.run("Hi")).output == "one"
        await agx.aclose()
    assert not problems.contexts


async def test_a_live_run_goes_on_and_recovers_at_once(redis_url: str) -> None:
    """Its connections break, and connecting raises for a while; then all of its events are there, on its database."""
    problems = Problems()
    store = BrokenSecretStore(KeyError("token"))
    store.error = None
    async with (
        Redis.from_url(redis_url, credential_provider=store, db=DATABASE) as client,
        Redis.from_url(redis_url, db=DATABASE) as straight,
    ):
        agx.configure(agx.Config(client))
        gate, talked = Gate(), Gate()
        agent = scripted_agent(["one", gate, " two", talked, " three"])
        running = asyncio.create_task(agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps()))
        listening = asyncio.create_task(collect(1, 1, "s"))
        await gate.reached.wait()
        await wait_until(lambda: _length_is(straight, 3))

        store.error = KeyError("token")
        asked = store.asked
        await straight.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await straight.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        gate.open.set()
        await talked.reached.wait()
        # Each kind of connection has been tried more than once by then.
        await wait_until(lambda: store.asked > asked + 20)
        store.error = None
        talked.open.set()
        assert (await running).output == "one two three"
        assert text_of(await read_stream(straight, STREAM)) == "one two three"
        check_seq(await read_stream(straight, STREAM))
        assert [event["body"]["seq"] for event in await listening] == list(range(len(await listening)))
        await agx.aclose()
        await straight.flushdb()
    async with Redis.from_url(redis_url) as zero:
        # What was left half open, without its database, must never be used.
        assert await zero.keys() == []
    assert not problems.contexts


async def _length_is(client: Redis, least: int) -> bool:
    return int(await client.xlen(STREAM)) >= least


async def test_nothing_in_connecting_blocks_the_loop(redis_url: str) -> None:
    client = Redis.from_url(redis_url)
    agx.configure(agx.Config(client))
    with blockbuster_ctx():
        result = await agx.run(FakeSession(), scripted_agent(["one"]), "Hi", deps=ScopeDeps())
        assert result.output == "one"
        assert await collect(1, 1, "s")
        await agx.aclose()
    await client.aclose()


async def test_a_server_that_is_a_replica_for_a_while_only_delays() -> None:
    """As in a failover behind one address: it refuses to write and stays reachable. A run waits, a start retries."""
    with EmbeddedServer() as server:
        async with Redis.from_url(server.url) as client, Redis.from_url(server.url) as admin:
            agx.configure(agx.Config(client))
            gate = Gate()
            agent = scripted_agent(["one", gate, " two"])
            live = asyncio.create_task(agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps()))
            await gate.reached.wait()

            await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
            gate.open.set()
            await wait_until(lambda: _refusals(admin, 1))
            before = await _refusal_count(admin)
            started = asyncio.create_task(
                agx.run(FakeSession(), scripted_agent(["new"]), "Hi", deps=ScopeDeps(session_id="new"))
            )
            await wait_until(lambda: _refusals(admin, before + 2))
            await admin.execute_command("REPLICAOF", "NO", "ONE")

            assert (await live).output == "one two"
            assert (await started).output == "new"
            for stream, text in ((STREAM, "one two"), ("agx:1:1:new", "new")):
                entries = await read_stream(admin, stream)
                check_seq(entries)
                assert text_of(entries) == text
            await agx.aclose()


async def _refusals(client: Redis, least: int) -> bool:
    return await _refusal_count(client) >= least


async def _refusal_count(client: Redis) -> int:
    stats = await client.info("errorstats")
    return int(stats.get("errorstat_READONLY", {"count": 0})["count"])


def scripted_agent(*turns: Any) -> Agent[ScopeDeps, str]:
    return Agent(scripted(*turns), deps_type=ScopeDeps)
