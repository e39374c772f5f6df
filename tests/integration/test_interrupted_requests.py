"""A process that stops in or before a model request: what the next attempt sends, and records of what was sent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.durable_worker import make_recipe
from support.run_facts import FactsOfRun
from support.workers import working

import agx
from agx.engine.lease import Lease
from agx.engine.leases import Leases
from agx.engine.registry import current_engine
from agx.facts.schema import NodeEnded
from agx.recovery.finalize import finalize_run
from agx.recovery.recorded_run import RecordedRun
from agx.redis import keys
from agx.runs.recording.run_events import RunEvents
from agx.sessions.redis_session import RedisSessions
from agx.stream.entry import StreamEntry
from agx.web.runs import PlainDeps, Runs, Who, make_plain_deps
from agx.web.turns import ask_again

INSTRUCTIONS = "Answer in one word. " * 20
PROMPT = "Where is my order?"


class Model:
    """A model whose first request is never answered in full."""

    def __init__(self) -> None:
        self.asking = asyncio.Event()

    async def answer(self, messages: Sequence[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        if self.asking.is_set():
            yield "Here."
            return
        yield "Let "
        self.asking.set()
        await asyncio.Event().wait()


async def run_in_two_workers(
    client: Redis,
    agent: Agent[ScopeDeps, Any],
    asking: asyncio.Event,
    *,
    stored: Sequence[ModelMessage] = (),
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> FactsOfRun:
    """Run a job whose first worker stops in the middle of a request.

    Args:
        asking: set in that request.
        stored: the conversation of earlier turns.
        meanwhile: called before the second worker starts.
    """

    async def recipe(job: agx.Job) -> agx.Call:
        ids = {"scope": job.scope_id, "user_id": job.user_id, "session_id": job.session_id}
        return agx.Call(FakeSession(msgs=list(stored)), agent, ScopeDeps(**ids))

    first, second = agx.Worker({"support": recipe}, grace=0), agx.Worker({"support": recipe})
    running = asyncio.create_task(first.run())
    run_id = await agx.submit("1", "1", "s", agent="support", prompt=PROMPT)
    await asking.wait()
    first.stop()
    await running
    if meanwhile is not None:
        await meanwhile()
    running = asyncio.create_task(second.run())
    events = [event async for event in agx.listen("1", "1", "s", serialize=False, wait=30)]
    assert events[-1]["body"]["outcome"] == "completed"
    run = await FactsOfRun.read(client, run_id)
    second.stop()
    await running
    return run


@pytest.mark.parametrize("instructions", ["", INSTRUCTIONS], ids=["no instructions", "instructions"])
async def test_the_estimate_of_a_first_request_has_its_instructions(configured: Redis, instructions: str) -> None:
    model = Model()
    agent = Agent(
        FunctionModel(stream_function=model.answer),
        name="support",
        deps_type=ScopeDeps,
        instructions=instructions or None,
    )
    run = await run_in_two_workers(configured, agent, model.asking)
    run.check(attempts=2)
    (estimated,) = [node.model.usage for node in run.requests if node.model and node.model.usage.source == "estimated"]
    assert estimated.input == math.ceil(len(instructions.strip() + PROMPT) / 4)
    assert estimated.output == 1


async def test_a_sidecar_estimates_the_same_as_the_next_worker(configured: Redis) -> None:
    """A second turn, whose tool has returned: what the provider bills is the whole conversation."""
    asking = asyncio.Event()

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        if len(messages) == 3:
            yield {0: DeltaToolCall("look", '{"where": "the depot, Zürich"}', tool_call_id="c")}
        elif asking.is_set():
            yield "Here."
        else:
            yield "Your order 📦 "
            asking.set()
            await asyncio.Event().wait()

    agent = Agent(FunctionModel(stream_function=answer), deps_type=ScopeDeps, instructions=INSTRUCTIONS)

    @agent.tool_plain
    def look(where: str) -> dict[str, Any]:
        return {"found": [where, 1.5, "ü" * 50]}

    stored: list[ModelMessage] = [
        ModelRequest([UserPromptPart("Hello")], instructions=INSTRUCTIONS.strip()),
        ModelResponse([TextPart("Good day to you")]),
    ]
    made: list[NodeEnded] = []
    session = keys.SessionKeys.of("agx", "1", "1", "s")

    async def finalize() -> None:
        entries = [StreamEntry.of(*entry) for entry in await configured.xrange(session.stream)]
        run = RecordedRun.of(run_id := entries[0].body["run_id"], entries)
        made.extend(fact for fact in finalize_run(session, run_id, run, ()).facts if isinstance(fact, NodeEnded))

    run = await run_in_two_workers(configured, agent, asking, stored=stored, meanwhile=finalize)
    interrupted = [[node for node in nodes if node.outcome == "lost" and node.model] for nodes in (made, run.requests)]
    (ours,), (theirs,) = interrupted
    assert ours.model is not None
    assert theirs.model is not None
    assert ours.model.usage == theirs.model.usage
    assert (ours.id, ours.model.usage.source, ours.model.usage.output) == (theirs.id, "estimated", 4)
    assert ours.model.usage.input > (len(INSTRUCTIONS) + 50) / 4


@dataclass
class Held(AbstractCapability[Any]):
    """Holds its run before the first model request."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def before_run(self, ctx: RunContext[Any]) -> None:
        self.begun.set()
        await asyncio.Event().wait()


def slow_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    hand_over = Leases.hand_over

    async def slowly(self: Leases, lease: Lease) -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        await hand_over(self, lease)

    monkeypatch.setattr(Leases, "hand_over", slowly)


async def test_another_answer_that_was_asked_for_is_given_by_the_next_process(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page asks for the last answer again, and the process dies before it has asked the model."""
    got: list[list[ModelMessage]] = []

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        got.append(list(messages))
        yield "New"

    agent = Agent(FunctionModel(stream_function=answer), name="support", deps_type=PlainDeps)

    async def recipe(job: agx.Job) -> agx.Call:
        ids = (job.scope_id, job.user_id, job.session_id)
        return agx.Call(agx.RedisSession(*ids), agent, make_plain_deps(*ids))

    held = Held()
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client))
        session = agx.RedisSession("1", "1", "s")
        session.msgs = [ModelRequest([UserPromptPart(PROMPT)]), ModelResponse([TextPart("Old")])]
        await session.save()
        runs = Runs(agent, RedisSessions(), make_plain_deps, {"capabilities": [held]}, "support")
        starting = asyncio.create_task(runs.start(Who("1", "1"), "s", ask_again(PROMPT)))
        await held.begun.wait()
        slow_hand_over(monkeypatch)
        await agx.aclose()
        assert not await client.exists("agx:1:1:s:live")  # the shutdown has waited for the hand-over
        await asyncio.wait({starting})
        assert isinstance(starting.exception(), agx.RunHandedOverError)

        agx.configure(agx.Config(redis=client))
        worker = agx.Worker({"support": recipe})
        running = asyncio.create_task(worker.run())
        assert [event async for event in agx.listen("1", "1", "s", wait=30)]
        worker.stop()
        await running
        await session.load()
        assert [message.parts[0].content for message in session.msgs] == [PROMPT, "New"]  # type: ignore[union-attr]
        assert [len(messages) for messages in got] == [1]
        await agx.aclose()


async def test_a_process_that_has_lost_its_run_makes_no_tool_call(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It notices the loss while it waits until the call is recorded; the next process decides about the call."""
    called: list[str] = []
    waits = 0
    wait_recorded = RunEvents.wait_recorded

    async def wait(self: RunEvents) -> None:
        nonlocal waits
        await wait_recorded(self)
        waits += 1
        if waits == 2:  # the first wait is the one before the model request
            self._state.fence()
            worker.stop()

    agent = Agent(TestModel(), name="support", deps_type=ScopeDeps)

    @agent.tool_plain
    async def work() -> str:
        called.append("work")
        return "done"

    async def recipe(job: agx.Job) -> agx.Call:
        ids = {"scope": job.scope_id, "user_id": job.user_id, "session_id": job.session_id}
        return agx.Call(FakeSession(), agent, ScopeDeps(**ids))

    monkeypatch.setattr(RunEvents, "wait_recorded", wait)
    worker = agx.Worker({"support": recipe})
    running = asyncio.create_task(worker.run())
    await agx.submit("1", "1", "s", agent="support", prompt=PROMPT)
    await running
    assert (waits, called) == (2, [])


async def test_a_final_answer_that_is_recorded_is_not_appended_again(configured: Redis) -> None:
    """A process dies between the result of an output tool and the run's end."""
    agent = Agent(
        TestModel(custom_output_args={"n": 1}), name="support", deps_type=ScopeDeps, output_type=dict[str, int]
    )
    recipes = {"support": make_recipe(agent)}
    session = keys.SessionKeys.of("agx", "acme", "ada", "s")

    async def follow() -> list[str]:
        events = [event async for event in agx.listen("acme", "ada", "s", serialize=False, wait=30)]
        assert events[-1]["type"] == "end"
        return [str(event["body"].get("part_kind", event["body"].get("event"))) for event in events]

    async with working(agx.Worker(recipes)):
        run_id = await agx.submit("acme", "ada", "s", agent="support", prompt=PROMPT)
        before = await follow()
        await FactsOfRun.read(configured, run_id)
    last, _ = (await configured.xrevrange(session.stream, count=1))[0]
    await configured.xdel(session.stream, last)
    leases = keys.leases("agx", keys.partition("acme", current_engine().queues.partitions or 1))
    await configured.zadd(leases, {session.lease_member(run_id): 1})
    async with working(agx.Worker(recipes)):
        after = await follow()
    assert (before.count("tool-return"), before.count("answer")) == (1, 1)
    assert (after.count("tool-return"), after.count("answer")) == (1, 1)
