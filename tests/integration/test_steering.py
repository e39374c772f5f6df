"""`agx.steer()`: a message reaches the live run's next model request once, and stands in its place everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from pydantic_ai import Agent, FunctionToolset
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from redis.asyncio import Redis
from support.agents import FakeSession, Gate, ScopeDeps, call, complete, prompts, scripted
from support.killed_runs import KilledError, Ledger, Points, Scenario, Stream, attempt
from support.run_facts import FactsOfRun
from support.waiting import wait_until

import agx
from agx.control.inbox import MAX_WAITING, Inbox
from agx.engine.registry import current_engine
from agx.facts.schema import RunSteered
from agx.redis.keys import SessionKeys
from agx.runs.lifecycle import enclosing_recorder
from agx.testing import MemorySession, collect
from agx_sidecar.metrics import instruments as i

KEYS = SessionKeys.of("agx", 1, 1, "s")


async def waiting() -> list[str]:
    return [message.text for message in await Inbox(current_engine().control, KEYS).read("0-0")]


@pytest.mark.parametrize("make_model", [lambda model: model, complete], ids=["streamed", "complete"])
async def test_a_message_is_in_the_next_request_and_in_its_place(
    configured: Redis, make_model: Callable[[FunctionModel], FunctionModel]
) -> None:
    gate = Gate()
    model = make_model(scripted([gate, *call("work", "{}")], ["sunny, ", "in French"]))
    agent = Agent(model, deps_type=ScopeDeps, name="a")
    agent.tool_plain(lambda: "worked", name="work")
    session = FakeSession()
    running = asyncio.create_task(agx.run(session, agent, "Weather?", ScopeDeps()))
    await gate.reached.wait()
    assert await agx.steer(1, 1, "s", "In French", key="k1")
    assert await agx.steer(1, 1, "s", "In French", key="k1")  # a repeat
    assert await waiting() == ["In French"]
    gate.open.set()
    await running
    assert prompts(session.msgs) == ["Weather?", "In French"]
    assert [message.kind for message in session.msgs] == ["request", "response", "request", "request", "response"]
    assert await waiting() == []
    events = await collect(1, 1, "s")
    (steered,) = [event for event in events if event["origin"] == "prompt"]
    assert steered["body"] | {"steer": True, "prompt": "In French"} == steered["body"]
    what = [event["body"].get("event", event["type"]) for event in events]
    assert what.index("info") == what.index("llm-begin", what.index("llm-end")) + 1
    facts = await FactsOfRun.read(configured, events[0]["body"]["run_id"])
    assert [fact.outcome for fact in facts.of(RunSteered)] == ["delivered"]
    assert facts.count(i.STEERS) == 1


async def test_a_run_that_has_its_answer_asks_once_more(configured: Redis) -> None:
    gate = Gate()
    agent = Agent(scripted(["first", gate], ["second"]), deps_type=ScopeDeps, name="a")
    session = FakeSession()
    running = asyncio.create_task(agx.run(session, agent, "Hi", ScopeDeps()))
    await gate.reached.wait()
    for text in ("one", "two"):
        assert await agx.steer(1, 1, "s", text)
    gate.open.set()
    assert (await running).output == "second"
    assert prompts(session.msgs) == ["Hi", "one", "two"]


async def test_a_lost_hint_is_made_up_for_at_the_end(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    agent = Agent(scripted(["first", gate], ["second"]), deps_type=ScopeDeps, name="a")
    session = FakeSession()
    running = asyncio.create_task(agx.run(session, agent, "Hi", ScopeDeps()))
    await gate.reached.wait()
    monkeypatch.setattr(current_engine().subscription, "_channels", {})
    assert await agx.steer(1, 1, "s", "one")
    gate.open.set()
    await running
    assert prompts(session.msgs) == ["Hi", "one"]


async def test_nothing_is_accepted_where_nothing_takes_it(configured: Redis) -> None:
    assert not await agx.steer(1, 1, "s", "nothing runs")
    await agx.start(1, 1, "s")
    assert not await agx.steer(1, 1, "s", "opened by hand")
    await agx.stop(1, 1, "s")
    session = FakeSession(may_save=asyncio.Event())
    agent = Agent(scripted(["Hi"]), deps_type=ScopeDeps, name="a")
    running = asyncio.create_task(agx.run(session, agent, "Hi", ScopeDeps()))
    await session.saving.wait()
    assert not await agx.steer(1, 1, "s", "it has ended")
    assert not await agx.steer(2, 1, "s", "another tenant")
    assert session.may_save is not None
    session.may_save.set()
    await running
    assert prompts(session.msgs) == ["Hi"]


async def test_a_cancelled_run_stores_what_it_did_not_take(configured: Redis) -> None:
    gate = Gate()
    agent = Agent(scripted(["half", gate], ["whole"]), deps_type=ScopeDeps, name="a")
    store: dict[str, bytes] = {}
    running = asyncio.create_task(agx.run(MemorySession("s", store), agent, "Hi", ScopeDeps()))
    await gate.reached.wait()
    assert await agx.steer(1, 1, "s", "one", key="k")
    recorder = next(iter(current_engine().runs)).recorder  # type: ignore[attr-defined]
    await wait_until(lambda: recorder.steered._enqueued)
    await agx.cancel(1, 1, "s")
    assert not await agx.steer(1, 1, "s", "two")
    with pytest.raises(agx.AgxCanceledError):
        await running
    events = await collect(1, 1, "s")
    assert [event["body"]["prompt"] for event in events if event["origin"] == "prompt"] == ["one"]
    facts = await FactsOfRun.read(configured, events[0]["body"]["run_id"])
    assert [fact.outcome for fact in facts.of(RunSteered)] == ["stored"]
    session = MemorySession("s", store)
    await agx.run(session, agent, "Again", ScopeDeps())
    assert prompts(session.msgs) == ["Hi", "one", "Again"]
    assert await waiting() == []


async def test_the_next_run_takes_what_a_lost_run_had(configured: Redis) -> None:
    await current_engine().ready()
    inbox = Inbox(current_engine().control, KEYS)
    for text in ("one", "two"):
        await inbox.put("lost", text, text)
    gate = Gate()
    session = FakeSession()
    agent = Agent(scripted([gate, "Hi"], ["Yes"]), deps_type=ScopeDeps, name="a")
    running = asyncio.create_task(agx.run(session, agent, "Hi", ScopeDeps()))
    await gate.reached.wait()
    gate.open.set()
    await running
    assert prompts(session.msgs) == ["Hi", "one", "two"]
    assert await inbox.put("next", "one", "one") == "put"  # its key is still known
    assert await waiting() == []


async def test_a_message_that_comes_while_the_session_is_loaded_is_in_the_first_request(configured: Redis) -> None:
    gate = Gate()
    session = FakeSession(may_load=asyncio.Event())
    agent = Agent(scripted([gate, "Hi"]), deps_type=ScopeDeps, name="a")
    running = asyncio.create_task(agx.run(session, agent, "Hi", ScopeDeps()))
    await session.loading.wait()
    assert await agx.steer(1, 1, "s", "one")
    recorder = next(iter(current_engine().runs)).recorder  # type: ignore[attr-defined]
    await wait_until(lambda: recorder.steered._known)
    assert session.may_load is not None
    session.may_load.set()
    await gate.reached.wait()
    gate.open.set()
    await running
    assert prompts(session.msgs) == ["Hi", "one"]


async def test_what_a_killed_run_had_stored_is_removed_and_not_taken_again(configured: Redis) -> None:
    await current_engine().ready()
    store: dict[str, bytes] = {}
    inbox = Inbox(current_engine().control, KEYS)
    gate = Gate()
    agent = Agent(scripted([gate, "One"], ["Two"], ["Three"]), deps_type=ScopeDeps, name="a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inbox, "remove", lambda *args: asyncio.sleep(0))  # as if it died right before
        running = asyncio.create_task(agx.run(MemorySession("s", store), agent, "Hi", ScopeDeps()))
        await gate.reached.wait()
        assert await agx.steer(1, 1, "s", "also")
        gate.open.set()
        await running
    assert [message.text for message in await inbox.read("0-0")] == ["also"]
    session = MemorySession("s", store)
    await agx.run(session, agent, "Again", ScopeDeps())
    assert prompts(session.msgs) == ["Hi", "also", "Again"]
    assert await waiting() == []


async def test_an_agent_that_somebody_else_drives_is_steered(configured: Redis) -> None:
    gate = Gate()
    agent = Agent(scripted(["first", gate], ["second"]), deps_type=ScopeDeps, name="a")
    running = asyncio.create_task(agent.run("Hi", capabilities=[agx.AgxCapability(1, 1, "s")], deps=ScopeDeps()))
    await gate.reached.wait()
    assert await agx.steer(1, 1, "s", "one")
    gate.open.set()
    assert prompts((await running).all_messages()) == ["Hi", "one"]
    assert await waiting() == []


async def test_a_message_is_at_the_model_within_milliseconds(configured: Redis) -> None:
    loop, gate = asyncio.get_running_loop(), Gate()
    agent = Agent(scripted([gate, "one"], ["two"]), deps_type=ScopeDeps, name="a")
    running = asyncio.create_task(agx.run(FakeSession(), agent, "Hi", ScopeDeps()))
    await gate.reached.wait()
    recorder = next(iter(current_engine().runs)).recorder  # type: ignore[attr-defined]
    began = loop.time()
    await agx.steer(1, 1, "s", "now")
    await wait_until(lambda: recorder.steered._enqueued)
    assert loop.time() - began < 0.9  # a lost hint would take a second
    gate.open.set()
    await running


@pytest.mark.parametrize("text", ["", "x" * 32_769, "\ud800", 7])
async def test_a_text_that_cannot_be_taken_is_refused(configured: Redis, text: Any) -> None:
    with pytest.raises(TypeError if text == 7 else agx.TextError):
        await agx.steer(1, 1, "s", text)


async def test_an_inbox_has_a_depth(configured: Redis) -> None:
    await current_engine().ready()
    inbox = Inbox(current_engine().control, KEYS)
    assert {await inbox.put("r", str(n), "text") for n in range(MAX_WAITING)} == {"put"}
    await current_engine().control.execute("SET", KEYS.live, "r", "EX", 60)
    with pytest.raises(agx.QueueFullError, match="50 messages"):
        await agx.steer(1, 1, "s", "one more")
    assert await inbox.put("r", "0", "text") == "put"  # a repeat


# --- a run that is killed at any point, and resumed ---

TEXTS = ("one", "two", "three")


def steered_agent(ledger: Ledger) -> Agent[ScopeDeps, str]:
    """Return an agent that calls a tool three times, each of which steers the run, as another process would."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        step = sum(message.kind == "response" for message in messages)
        ledger.add(f"model {step} {prompts(messages)}")
        if step < len(TEXTS):
            yield {0: DeltaToolCall("work", f'{{"n": {step}}}', tool_call_id=f"w{step}")}
        else:
            yield "done"

    async def work(n: int) -> str:
        ledger.add(f"work {n}")
        recorder = enclosing_recorder()
        assert recorder is not None
        assert recorder.steered.inbox is not None
        await recorder.steered.inbox.put("r", TEXTS[n], TEXTS[n])
        recorder.steered.look()
        await wait_until(lambda: len(recorder.steered._known) > n)
        return f"worked {n}"

    tools = FunctionToolset[ScopeDeps]()
    tools.add_function(work, metadata={"on_resume": "retry"})
    return Agent(FunctionModel(stream_function=answer), deps_type=ScopeDeps, name="killed", toolsets=[tools])


@pytest.mark.parametrize("eager", [True, False], ids=["all-stored", "only-waited-for"])
async def test_a_kill_at_any_point_loses_and_repeats_no_message(configured: Redis, eager: bool) -> None:
    await current_engine().ready()
    scenario = Scenario(steered_agent)
    unharmed = await play(configured, scenario, None, eager)
    points = len(unharmed.points.names)
    assert points > 20
    for kill_at in range(eager, points, 5):  # all of them pass
        await play(configured, scenario, kill_at, eager)


async def play(client: Redis, scenario: Scenario, kill_at: int | None, eager: bool) -> Ledger:
    """Play a run that is killed at a point; check its conversation and what its model was asked."""
    await client.delete(KEYS.inbox)
    ledger, stream = Ledger(Points(kill_at)), Stream(eager)
    try:
        ended = await attempt(scenario, ledger, stream, first=True, is_steered=True)
    except KilledError:
        ledger.points = Points()
        ended = await attempt(scenario, ledger, stream, first=False, is_steered=True)
    texts = [
        part["content"] for message in ended.messages for part in message["parts"] if "prompt" in part["part_kind"]
    ]
    assert texts == ["hello", *TEXTS], (kill_at, ledger.calls)
    assert ledger.calls[-1] == f"model 3 {texts}"
    assert ended.output == "done"
    return ledger
