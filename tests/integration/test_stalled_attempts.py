"""A process stalls, another one goes on with its run, and then the first one goes on, too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError
from support.agents import ScopeDeps
from support.durable_worker import make_recipe
from support.waiting import wait_until
from support.workers import working

import agx
from agx.engine.lease import Lease
from agx.engine.leases import Leases
from agx.engine.registry import current_engine
from agx.recovery.dead_run import DeadRun
from agx.recovery.missing_facts import read_queued_facts
from agx.redis import keys
from agx.redis.live_key import new_holder
from agx.runs import dead_attempts
from agx.runs.lifecycle import RunLifecycle

SESSION = keys.SessionKeys.of("agx", "acme", "ada", "s")

Meanwhile = Callable[[list[ModelMessage]], Awaitable[None]]


def make_agent(meanwhile: Meanwhile, tool: Callable[[], Awaitable[None]]) -> Agent[ScopeDeps, str]:
    """Return an agent that calls a tool and then answers; something happens just before the answer."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        if len(messages) == 1:
            yield {0: DeltaToolCall(name="look", json_args="{}", tool_call_id="one")}
            return
        await meanwhile(messages)
        yield "the second answer"

    async def look() -> str:
        await tool()
        return "seen"

    return Agent(FunctionModel(stream_function=answer), deps_type=ScopeDeps, name="support", tools=[look])


async def resume(meanwhile: Meanwhile) -> str:
    """Have a worker hand a run over after its first step, and another one go on with it; returns the outcome."""
    first: agx.Worker

    async def stop_first() -> None:
        first.stop()

    async def nothing() -> None: ...

    first = agx.Worker({"support": make_recipe(make_agent(meanwhile, stop_first))})
    async with working(first):
        await agx.submit("acme", "ada", "s", agent="support", prompt="Hello")
        await wait_until(first._stop.is_set)
    async with working(agx.Worker({"support": make_recipe(make_agent(meanwhile, nothing))})):
        events = [event async for event in agx.listen("acme", "ada", "s", serialize=False, wait=10)]
    assert [event["type"] for event in events].count("resume") == 1
    return str(events[-1]["body"]["outcome"])


async def read_answers() -> list[str]:
    session = agx.RedisSession("acme", "ada", "s")
    await session.load()
    return [message.text or "" for message in session.msgs if isinstance(message, ModelResponse) and message.text]


async def test_what_a_stalled_attempt_has_saved_is_replaced(configured: Redis) -> None:
    async def save_first_answer(messages: list[ModelMessage]) -> None:
        stalled = agx.RedisSession("acme", "ada", "s")
        await stalled.load()
        stalled.msgs = [*messages, ModelResponse(parts=[TextPart("the first answer")])]
        await stalled.save()

    assert await resume(save_first_answer) == "completed"
    assert await read_answers() == ["the second answer"]


async def test_what_others_have_saved_is_not_replaced(configured: Redis) -> None:
    async def save_other(messages: list[ModelMessage]) -> None:
        other = agx.RedisSession("acme", "ada", "s")
        await other.load()
        other.msgs = [ModelRequest.user_text_prompt("Other"), ModelResponse(parts=[TextPart("Another answer")])]
        await other.save()

    assert await resume(save_other) == "failed"
    assert await read_answers() == ["Another answer"]


async def test_an_attempt_that_has_stalled_saves_nothing_where_another_one_goes_on(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stall(messages: list[ModelMessage]) -> None:
        (lease,) = current_engine().leases._held.values()
        await configured.set(SESSION.live, new_holder(lease.run_id, 2), px=60_000)
        monkeypatch.setattr(Leases, "holds", lambda self, lease: False)

    async def give_up(self: RunLifecycle) -> None:
        await check_lease(self)
        await configured.delete(SESSION.live)  # the other one could not go on with the run

    async def nothing() -> None: ...

    check_lease = RunLifecycle.check_lease
    monkeypatch.setattr(RunLifecycle, "check_lease", give_up)
    session = agx.RedisSession("acme", "ada", "s")
    deps = ScopeDeps(scope="acme", user_id="ada", session_id="s")
    with pytest.raises(agx.LeaseLostError):
        await agx.run(session, make_agent(stall, nothing), "Hello", deps=deps, resume="support")
    assert await read_answers() == []
    (index,) = await configured.keys("agx::leases:*")
    # It counts as one that died: its facts are searched.
    assert [score > 0 for _, score in await configured.zrange(index, 0, -1, withscores=True)] == [True]


async def nothing_happens(messages: list[ModelMessage]) -> None: ...


async def test_facts_are_searched_only_where_the_process_before_may_not_have_queued_them(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    async def search(call: Any, queue: str, run_id: str, run: Any) -> list[Any]:
        searched.append(run_id)
        return []

    monkeypatch.setattr(dead_attempts, "read_queued_facts", search)
    assert await resume(nothing_happens) == "completed"
    assert searched == []


async def test_facts_of_a_dead_attempt_are_queued_once_redis_answers(
    configured: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    async def search(*args: Any) -> list[Any]:
        tries.append(len(tries))
        if len(tries) == 1:
            raise RedisTimeoutError
        return await read_queued_facts(*args)

    monkeypatch.setattr(DeadRun, "has_all_facts", False)
    monkeypatch.setattr(dead_attempts, "read_queued_facts", search)
    assert await resume(nothing_happens) == "completed"
    assert tries == [0, 1]
    assert "lost" not in caplog.text


async def test_a_hand_over_leaves_the_deadline_of_the_process_that_goes_on(configured: Redis) -> None:
    engine = current_engine()
    await engine.ready()
    stalled, successor = (
        Lease(SESSION, "r", lambda *_: None, lambda: None, new_holder("r", n), recover=60) for n in (1, 2)
    )
    await engine.leases.acquire(stalled)
    await configured.delete(SESSION.live)
    assert await engine.leases.take_over(successor)
    await engine.leases.hand_over(stalled)
    (index,) = await configured.keys("agx::leases:*")
    assert (await configured.zscore(index, SESSION.lease_member("r")) or 0) > 0
    await engine.leases.release(successor)
