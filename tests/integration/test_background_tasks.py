"""Background tasks that keep a run or a listener alive survive an exception of a kind that nobody expected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.recorded import read_facts
from support.waiting import wait_until

import agx
from agx.engine import process_heartbeat
from agx.engine.leases import Leases
from agx.engine.process_heartbeat import ProcessHeartbeat
from agx.engine.registry import current_engine
from agx.facts import schema as facts
from agx.facts.queues import Queues
from agx.stream import hub
from agx.stream.hub import Hub
from agx.stream.subscription import Subscription
from agx.stream.writer import SessionWriter

LEASE = 0.6  # seconds


@pytest.fixture
async def redis(redis_url: str) -> Any:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE))
        yield client
        await agx.aclose()


@contextmanager
def failing(owner: type, method: str, times: int = 2) -> Iterator[Callable[[], int]]:
    """Let a method raise at its first calls; gives how often it has raised."""
    raised = 0
    original = getattr(owner, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal raised
        if raised < times:
            raised += 1
            raise LookupError("a kind of exception that nobody expected")
        return original(self, *args, **kwargs)

    with patch.object(owner, method, call):
        yield lambda: raised


@pytest.mark.parametrize(
    ("owner", "method", "task"),
    [
        (Leases, "_renew", "agx-leases"),
        (Subscription, "_keep_connected", "agx-subscription"),
        (Hub, "_poll_quiet", "agx-hub-poll"),
        (ProcessHeartbeat, "_emit", "agx-process-heartbeat"),
        (Queues, "_take", "agx-queues"),
        (SessionWriter, "send", "agx-group-commit"),
    ],
)
async def test_a_task_that_raises_goes_on(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, task: str
) -> None:
    monkeypatch.setattr(process_heartbeat, "_INTERVAL", 0.05)
    monkeypatch.setattr(hub, "POLL", 0.05)
    stage = ScriptedAgent(hold_after=2)
    with failing(owner, method) as raised:
        running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hello", deps=ScopeDeps()))

        async def listen() -> list[dict[str, Any]]:
            return [event async for event in agx.listen(1, 1, "s", serialize=False)]

        listening = asyncio.create_task(listen())
        await wait_until(lambda: raised() == 2)
        await stage.reached.wait()
        supervisor = current_engine().supervisor
        assert supervisor.failures[task] == 2
        assert await agx.cancel(1, 1, "s")
        with pytest.raises(agx.AgxCanceledError):
            await running
    events = await listening
    assert events[-1]["body"]["outcome"] == "cancelled"
    assert [event["body"]["seq"] for event in events] == list(range(len(events)))
    assert not await redis.exists("agx:1:1:s:live")
    ended = [fact for fact in await read_facts(redis) if isinstance(fact, facts.RunEnded)]
    assert len(ended) == 1
