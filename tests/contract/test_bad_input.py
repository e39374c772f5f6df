"""Bad input and missing parts: a clear error of the `AgxError` tree that says what to do; nothing hangs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
from pydantic_ai import Agent
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from support.agents import Gate, ScopeDeps, complete, scripted
from support.recorded import check_seq, of_kind, read_facts, read_stream
from support.waiting import wait_until

import agx
from agx.errors import (
    AgxError,
    BodyError,
    NotConfiguredError,
    RedisUnavailableError,
)
from agx.facts.schema import RunEnded
from agx.testing import MemorySession

GENEROUS = 30  # seconds; that nothing hangs is the point, not how fast it fails


async def run(session: MemorySession | None = None) -> None:
    await agx.run(session or MemorySession(id="s"), Agent(scripted(["never"])), "hi", deps=ScopeDeps())


async def observe() -> None:
    await Agent(scripted(["never"]), capabilities=[agx.AgxCapability(1, 1, "s")]).run("hi")


async def drain(events: AsyncGenerator[Any, None]) -> None:
    async for _ in events:
        pass


CALLS: dict[str, Callable[[], Awaitable[object]]] = {
    "run": run,
    "capability": observe,
    "start": lambda: agx.start(1, 1, "s"),
    "stop": lambda: agx.stop(1, 1, "s"),
    "add": lambda: agx.add(1, 1, "s", type="info", origin="mine"),
    "deps.add_info": lambda: ScopeDeps().add_info({"a": 1}),
    "is_live": lambda: agx.is_live(1, 1, "s"),
    "cancel": lambda: agx.cancel(1, 1, "s"),
    "q": lambda: drain(agx.q(1, 1)),
    "redis session load": lambda: agx.RedisSession(1, 1, "s").load(),
    "redis session save": lambda: agx.RedisSession(1, 1, "s").save(),
}
LISTENERS: dict[str, Callable[[], Awaitable[object]]] = {
    "listen": lambda: drain(agx.listen(1, 1, "s", wait=1)),
    "resuming listen": lambda: drain(agx.listen(1, 1, "s", wait=1, timeout=1, after="1-0")),
    "sse": lambda: drain(agx.sse(1, 1, "s")),
}


# --- unconfigured ---


@pytest.mark.parametrize("call", CALLS | LISTENERS)
async def test_before_configure_every_call_says_what_to_do(call: str) -> None:
    with patch("agx.config._current", None), pytest.raises(NotConfiguredError, match=r"agx\.configure\(agx\.Config\("):
        await (CALLS | LISTENERS)[call]()


@pytest.mark.parametrize("wrong", [None, {}, "redis://localhost", SyncRedis])
def test_configure_takes_a_config_only(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"agx\.Config"):
        agx.configure(wrong)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"redis": None}, "asyncio redis-py client"),
        ({"redis": "redis://localhost"}, "asyncio redis-py client"),
        ({"redis": SyncRedis()}, "asyncio redis-py client"),
        ({"lease_ttl": 0}, "lease_ttl"),
        ({"lease_ttl": float("nan")}, "lease_ttl"),
        ({"retention": -1}, "retention"),
        ({"max_stream_length": 0}, "max_stream_length"),
        ({"max_body": 10}, "max_body"),
        ({"queue_partitions": 0}, "queue_partitions"),
        ({"queue_max_length": 0}, "queue_max_length"),
        ({"trace_ratio": 1.5}, "trace_ratio"),
        ({"trace_ratio": float("nan")}, "trace_ratio"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        agx.Config(**{"redis": Redis()} | settings)


def test_the_errors_are_one_tree() -> None:
    errors = [getattr(agx, name) for name in agx.__all__ if name.endswith("Error")]
    assert len(errors) >= 8
    assert all(issubclass(error, AgxError) for error in errors)


# --- unreachable Redis ---


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose owner takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        yield port


@pytest.fixture(params=["refused", "silent"])
async def nowhere(request: pytest.FixtureRequest, silent_port: int) -> AsyncGenerator[int, None]:
    """agx on a Redis that is not there; the user's client itself would be more patient than agx may be."""
    port = 1 if request.param == "refused" else silent_port
    patient = Retry(ExponentialBackoff(cap=10, base=1), 10)
    async with Redis(host="127.0.0.1", port=port, password="secret-word", retry=patient) as client:
        agx.configure(agx.Config(client, lease_ttl=1))
        yield port
        async with asyncio.timeout(GENEROUS):
            await agx.aclose()


async def test_unreachable_redis_is_said_clearly_and_nothing_hangs(nowhere: int) -> None:
    session = MemorySession(id="s")
    calls = CALLS | LISTENERS | {"run": lambda: run(session)}
    async with asyncio.timeout(GENEROUS):
        raised = await asyncio.gather(*(call() for call in calls.values()), return_exceptions=True)
    for name, error in zip(calls, raised, strict=True):
        assert isinstance(error, RedisUnavailableError), (name, error)
        assert "check that it runs and that agx may use it" in str(error)
        assert "secret-word" not in str(error)
    assert session.store == {}  # nothing was run


async def test_a_run_without_a_stream_needs_no_redis(nowhere: int) -> None:
    agent: Agent[None, str] = Agent(complete(scripted(["an", "swer"])), capabilities=[agx.AgxCapability()])
    async with asyncio.timeout(GENEROUS):
        assert (await agent.run("hi")).output == "answer"


# --- bodies ---


class Odd:
    pass


@pytest.mark.parametrize(
    "body",
    [{"a": Odd()}, {"a": b"x"}, {"a": {1, 2}}, {"a": 2**70}, {"a": "\ud800"}, {1: "a"}, ["a"], "a", 1],
    ids=["object", "bytes", "set", "int", "surrogate", "key", "list", "str", "number"],
)
async def test_a_body_that_is_no_json_object_is_refused_and_nothing_is_written(configured: Redis, body: Any) -> None:
    await agx.start(1, 1, "s")
    with pytest.raises(BodyError, match="an event's body must be a dict of JSON values"):
        await agx.add(1, 1, "s", type="info", origin="mine", body=body)
    with pytest.raises(BodyError):
        await ScopeDeps().add_info(body)
    with pytest.raises(BodyError):
        await ScopeDeps().add_error(body)
    await agx.stop(1, 1, "s")
    entries = await read_stream(configured)
    assert [e.type for e in entries] == ["begin", "end"]
    check_seq(entries)


async def test_a_circular_body_is_refused(configured: Redis) -> None:
    body: dict[str, Any] = {}
    body["self"] = body
    with pytest.raises(BodyError):
        await agx.add(1, 1, "s", type="info", origin="mine", body=body)
    assert not await configured.exists("agx:1:1:s")


async def test_what_others_wrote_that_is_no_json_is_passed_on_as_text(configured: Redis) -> None:
    for body in ("{not json", "[1]", '"a"', "", b"\xff\xfe", '{"a": NaN}'):
        await configured.xadd("agx:1:1:s", {"type": "info", "origin": "peer", "body": body})
    await configured.xadd("agx:1:1:s", {"odd": "no type at all"})
    await configured.xadd("agx:1:1:s", {"type": "end", "origin": "peer"})
    await configured.expire("agx:1:1:s", 60)
    events = [event async for event in agx.listen(1, 1, "s", serialize=False)]
    assert [event["body"] for event in events] == [
        {"raw": "{not json"},
        {"raw": "[1]"},
        {"raw": '"a"'},
        {"raw": ""},
        {"raw": "\ufffd\ufffd"},
        {"raw": '{"a": NaN}'},
        {},
        {},
    ]
    assert len([event async for event in agx.listen(1, 1, "s")]) == 8


# --- a second run on a live session ---


async def test_a_second_run_on_a_live_session_is_refused_and_harms_nothing(configured: Redis) -> None:
    gate = Gate()
    first = asyncio.create_task(
        agx.run(MemorySession(id="s"), Agent(scripted(["a", gate, "b"])), "hi", deps=ScopeDeps())
    )
    await gate.reached.wait()
    second = MemorySession(id="s")
    attempts: list[Callable[[], Awaitable[None]]] = [lambda: run(second), lambda: agx.start(1, 1, "s"), observe]
    for attempt in attempts:
        with pytest.raises(agx.SessionBusyError, match="wait for its `end`, or cancel"):
            await attempt()
    assert await agx.is_live(1, 1, "s")
    assert [found async for found in agx.q(1, 1)] == [(1, 1, "s")]
    gate.open.set()
    assert (await first).output == "ab"
    entries = await read_stream(configured)
    check_seq(entries)
    assert [e.type for e in entries].count("begin") == 1
    assert second.store == {}
    (end,) = of_kind(RunEnded, await read_facts(configured))
    assert end.outcome == "completed"


async def test_of_many_runs_at_once_one_wins(configured: Redis) -> None:
    gate = Gate()
    attempts = [
        asyncio.create_task(agx.run(MemorySession(id="s"), Agent(scripted(["a", gate])), "hi", deps=ScopeDeps()))
        for _ in range(10)
    ]
    await wait_until(lambda: sum(attempt.done() for attempt in attempts) == 9 and gate.reached.is_set())
    gate.open.set()
    results = await asyncio.gather(*attempts, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AgentRunResult"] + ["SessionBusyError"] * 9
    check_seq(await read_stream(configured))


# --- cursors ---

WRONG_CURSORS: list[Any] = [
    *(
        "",
        "abc",
        "1-",
        "-1",
        "1-2-3",
        "-1-0",
        "1--1",
        "5--3",
        " 1-0",
        "1-0 ",
        "1_0-0",
        "+1-0",
        "٣-0",
        "$",
        ">",
        "0x1-0",
    ),
    *("1-0\n", "99999999999999999999-0", "1-18446744073709551616", f"{2**64 - 1}-{2**64 - 1}", "(1-0", "1.5", "\ud800"),
    *(1, 1.5, b"1-0", True, [], object()),
]


@pytest.mark.parametrize("cursor", WRONG_CURSORS, ids=lambda cursor: ascii(cursor).partition(" at ")[0])
async def test_a_wrong_cursor_is_refused(configured: Redis, cursor: Any) -> None:
    async with asyncio.timeout(GENEROUS):
        with pytest.raises((ValueError, TypeError), match="the id of an event"):
            await drain(agx.listen(1, 1, "s", after=cursor))
        if cursor:  # an empty one is what a browser sends that has none
            with pytest.raises((ValueError, TypeError), match="the id of an event"):
                await drain(agx.sse(1, 1, "s", last_event_id=cursor))


@pytest.mark.parametrize("cursor", ["0", "0-0", "1", "1-0", "18446744073709551615-1"])
async def test_the_ids_that_redis_itself_takes_are_cursors(configured: Redis, cursor: str) -> None:
    assert [event async for event in agx.listen(1, 1, "nobody", after=cursor, timeout=0)] == []


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), None, "5"])
async def test_a_grace_period_that_is_no_number_of_seconds_is_refused(configured: Redis, seconds: Any) -> None:
    await agx.start(1, 1, "s")
    with pytest.raises((ValueError, TypeError)):
        await agx.stop(1, 1, "s", grace_period=seconds)
    assert await agx.is_live(1, 1, "s")
    await agx.stop(1, 1, "s")
