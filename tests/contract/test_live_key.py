"""The live key's value: any bytes are understood alike by Python and by the scripts, and none stops anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_ai import Agent
from redis.asyncio import Redis as AsyncRedis
from support.agents import FakeSession, Gate, ScopeDeps, scripted
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.redis.bus import Script
from agx.redis.keys import SessionKeys
from agx.redis.live_key import ACQUIRE, CLAIM, LUA, MARK_CANCELLED, RELEASE, RENEW, new_claim, parse_live

LEASE = 0.6  # seconds
SESSION = SessionKeys.of("agx", 1, 1, "s")
UNREADABLE = [
    b"", b"cancel:a:b:c", b"cancel:a:", b"cancel::5", "cancel:a:²".encode(), b"cancel:a:1\n", b"\xff\xfe", b"a b",
    b"a:b", b"cancel:a:" + b"9" * 400, b"x" * 301,
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "kind", "run_id", "attempt", "mark_ms"),
    [
        (b"run", "held", "run", 1, None),
        (b"run~2.f00", "held", "run", 2, None),
        (b"a~1.b~12.c", "held", "a~1.b", 12, None),
        (b"run~2", "held", "run~2", 1, None),
        (b"cancel:run:17", "cancelled", "run", 1, 17),
        (b"cancel:run~3.n:17", "cancelled", "run", 3, 17),
        (b"reaper:5f", "claimed", None, 1, None),
        (b"1", "foreign", None, 1, None),
        *((raw, "unreadable", None, 1, None) for raw in UNREADABLE),
    ],
)
def test_what_a_value_means(raw: bytes, kind: str, run_id: str | None, attempt: int, mark_ms: int | None) -> None:
    value = parse_live(raw)
    assert (value.kind, value.run_id, value.attempt, value.mark_ms) == (kind, run_id, attempt, mark_ms)


_PIECES = st.sampled_from(
    [b"cancel", b"reaper", b":", b"run", b"~", b"2", b".", b"n", b"1", b"-", b" ", b"\xb2", b"\n"]
)
_READ = f"{LUA} local holder = holder_of(ARGV[1]) return {{holder or false, holder and run_of(holder) or false}}"


@given(raw=st.one_of(st.lists(_PIECES, max_size=9).map(b"".join), st.binary(max_size=20)))
@example(raw=b"run~2.f00")
@example(raw=b"a~1.b~12.c")
@example(raw=b"cancel:1:5")
@example(raw=b"cancel:a:" + b"9" * 16)
def test_the_scripts_read_a_value_as_python_does(raw: bytes, server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        answer = client.eval(_READ, 0, raw)
    value = parse_live(raw)
    assert answer == [None if part is None else part.encode() for part in (value.holder, value.run_id)]


def _run(client: redis.Redis, script: Script, *args: str | int) -> Any:
    return client.eval(script.source, 1, SESSION.live, *args)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_only_its_holder_renews_and_releases_a_lease(client: redis.Redis) -> None:
    assert _run(client, ACQUIRE, "run~2.a", 9_000)[0] == 1
    for stranger in ("run", "run~2.b", "run~3.a", "other"):
        assert _run(client, ACQUIRE, stranger, 9_000) == [0, b"run~2.a"]
        assert _run(client, RENEW, stranger, 60_000) == b"run~2.a"
        assert _run(client, RELEASE, stranger) == 0
    assert client.pttl(SESSION.live) <= 9_000
    assert _run(client, MARK_CANCELLED, SESSION.cancel_channel, "other") == b"none"
    assert _run(client, MARK_CANCELLED, SESSION.cancel_channel, "run") == b"marked"
    mark = client.get(SESSION.live)
    assert parse_live(mark).holder == "run~2.a"
    assert _run(client, MARK_CANCELLED, SESSION.cancel_channel) == b"marked"
    assert client.get(SESSION.live) == mark  # the first mark wins
    assert _run(client, RELEASE, "run") == 0
    assert _run(client, ACQUIRE, "run~2.a", 60_000)[0] == 1
    assert client.get(SESSION.live) == mark
    assert client.pttl(SESSION.live) > 9_000
    assert _run(client, RELEASE, "run~2.a") == 1


def test_a_claim_is_extended_by_nobody_and_cancelled_by_nobody(client: redis.Redis) -> None:
    claim = new_claim()
    assert _run(client, CLAIM, claim, 5_000) == 1
    assert _run(client, CLAIM, new_claim(), 5_000) == 0
    assert _run(client, RENEW, "run", 60_000) == claim.encode()
    assert client.pttl(SESSION.live) <= 5_000
    assert _run(client, MARK_CANCELLED, SESSION.cancel_channel) == b"claimed"
    assert _run(client, RELEASE, "run") == 0
    assert _run(client, RELEASE, claim) == 1


def test_a_deleted_lease_is_not_brought_back(client: redis.Redis) -> None:
    assert _run(client, RENEW, "run", 9_000) is None
    assert not client.exists(SESSION.live)


@pytest.fixture
async def agx_redis(redis_url: str) -> AsyncIterator[AsyncRedis]:
    async with AsyncRedis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE))
        yield client
        await agx.aclose()


@pytest.mark.parametrize("junk", UNREADABLE)
async def test_an_unreadable_value_stops_no_renewal(junk: bytes, agx_redis: AsyncRedis) -> None:
    """Another run of the same process keeps its lease, and the run whose key it is goes on."""
    gate = Gate()
    agent: Agent[ScopeDeps, str] = Agent(scripted(["one ", gate, "two"]), deps_type=ScopeDeps)
    other_gate = Gate()
    other: Agent[ScopeDeps, str] = Agent(scripted([other_gate, "other"]), deps_type=ScopeDeps)
    running = asyncio.create_task(agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps()))
    beside = asyncio.create_task(agx.run(FakeSession(), other, "Hi", deps=ScopeDeps(session_id="s2")))
    await gate.reached.wait()
    await other_gate.reached.wait()
    held = await agx_redis.get(SESSION.live)
    for channel in (SESSION.cancel_channel, "agx:1:1:s2:cancel"):
        assert await agx_redis.publish(channel, junk)
        assert await agx_redis.publish(channel, f"cancel:{held.decode()}:²")
    await agx_redis.set(SESSION.live, junk, px=int(LEASE * 2_500))
    assert await agx.cancel(1, 1, "s") is False  # nobody knows whose it is

    async def taken_again() -> bool:
        return bool(await agx_redis.get(SESSION.live) == held)

    await wait_until(taken_again)
    assert await agx_redis.exists("agx:1:1:s2:live")
    gate.open.set()
    assert (await running).output == "one two"
    assert await agx.cancel(1, 1, "s2")
    with pytest.raises(agx.AgxCanceledError):
        await beside
