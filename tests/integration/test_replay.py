"""A replayed run says what its agent said: pydantic-ai's own events on one side, the stored ones on the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults, ModelRetry, RunContext, ToolReturn
from pydantic_ai.capabilities import AbstractCapability, HandleDeferredToolCalls
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import (
    AgentStreamEvent,
    DeferredToolRequestsEvent,
    FinalResultEvent,
    ModelResponse,
    NativeToolCallPart,
    NativeToolReturnPart,
    OutputToolCallEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallEvent,
    ToolCallPart,
    ToolCallPartDelta,
    ToolResultEvent,
)
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.run import AgentRunResultEvent
from redis.asyncio import Redis
from support.agents import Delta, FakeSession, Gate, ScopeDeps, ScriptedAgent, call, scripted, think
from support.waiting import wait_until

import agx
from agx.errors import RunFailedError
from agx.listeners.replay import replay, replay_entries, replay_messages
from agx.listeners.replayed_run import ErrorEvent, Event, InfoEvent
from agx.stream.entry import StreamEntry

pytestmark = pytest.mark.usefixtures("configured")


@dataclass
class Watch(AbstractCapability[Any]):
    """Keeps a run's native events."""

    events: list[AgentStreamEvent] = field(default_factory=list)
    id: str | None = "watch"

    async def wrap_run_event_stream(self, ctx: RunContext[Any], *, stream: Any) -> AsyncIterator[AgentStreamEvent]:
        async for event in stream:
            self.events.append(event)
            yield event


async def run_watched(agent: Agent[ScopeDeps, Any]) -> list[AgentStreamEvent]:
    """Run an agent; return what it gave."""
    watch = Watch()
    await agx.run(FakeSession(), agent, "Go", ScopeDeps(), capabilities=[watch])
    return watch.events


async def read_into(found: list[Event]) -> None:
    """Replay the session; what came is in `found` whatever happens."""
    async for event in replay(1, 1, "s"):
        found.append(event)  # noqa: PERF401 - it is read while it grows


async def replayed() -> list[Event]:
    await read_into(found := [])
    return found


def plain(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    """Return events as what a front end makes of them: deltas joined, a tool call's arguments whole, no times."""
    found: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, PartStartEvent):
            part = event.part
            content = part.content if isinstance(part, (TextPart, ThinkingPart)) else ""
            found.append(("start", event.index, part.part_kind, event.previous_part_kind, content))
        elif isinstance(event, PartDeltaEvent):
            if isinstance(event.delta, ToolCallPartDelta):
                continue
            assert isinstance(event.delta, (TextPartDelta, ThinkingPartDelta))
            at = max(n for n, one in enumerate(found) if one[0] == "start")
            *start, content = found[at]
            assert start[1] == event.index
            found[at] = (*start, content + (event.delta.content_delta or ""))
        elif isinstance(event, PartEndEvent):
            found.append(("end", event.index, *describe(event.part)))
        elif isinstance(event, (ToolResultEvent, ToolCallEvent)):
            found.append((event.event_kind, *describe(event.part)))
        else:
            found.append((event,))
    return found


def describe(part: Any) -> tuple[Any, ...]:
    if isinstance(part, (ToolCallPart, NativeToolCallPart)):
        return part.part_kind, part.tool_name, part.tool_call_id, part.args_as_dict()
    if hasattr(part, "outcome"):
        return part.part_kind, part.tool_name, part.tool_call_id, part.content, part.outcome
    return part.part_kind, part.content


async def test_text_and_thinking() -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*think("let ", "me ", "see"), "the ", "ans", "wer"]), deps_type=ScopeDeps
    )
    native = await run_watched(agent)
    assert plain(await replayed()) == plain(native)


async def test_tools_parallel_retried_denied_and_failed_arguments() -> None:
    calls: list[Delta] = [
        *call("add", '{"a": 1, ', '"b": 2}', call_id="c1", index=0),
        *call("picky", "{}", call_id="c2", index=1),
        *call("add", '{"a": "no"}', call_id="c3", index=2),
        *call("nobody", "{}", call_id="c4", index=3),
    ]
    agent: Agent[ScopeDeps, str] = Agent(scripted(["calling ", *calls], ["done"]), deps_type=ScopeDeps)

    @agent.tool_plain
    def add(a: int, b: int) -> dict[str, int]:
        return {"sum": a + b}

    @agent.tool_plain
    def picky() -> str:
        raise ModelRetry("not like this")

    native, found = plain(await run_watched(agent)), plain(await replayed())
    # Retries are told to the model in words of pydantic-ai's; parallel tools end in any order.
    assert {one[:4] for one in found if "tool-return" in one} == {one[:4] for one in native if "tool-return" in one}
    assert {one[3]: one[-1] for one in found if "tool-return" in one} == {
        "c1": "success",
        "c2": "retried",
        "c3": "retried",
        "c4": "retried",
    }
    assert [one for one in found if "tool-return" not in one] == [one for one in native if "tool-return" not in one]


def cautious(*replies: Any) -> Agent[ScopeDeps, Any]:
    agent: Agent[ScopeDeps, Any] = Agent(
        scripted(*replies), deps_type=ScopeDeps, output_type=[str, DeferredToolRequests]
    )

    @agent.tool_plain(requires_approval=True)
    def delete(path: str) -> str:
        return f"{path} deleted"

    return agent


async def test_a_run_that_leaves_a_call_to_be_approved_ends_with_it() -> None:
    agent = cautious(["I will", *call("delete", '{"path": "/a"}', index=1)])
    native = [event for event in await run_watched(agent) if not isinstance(event, DeferredToolRequestsEvent)]
    *found, last = await replayed()
    assert plain(found) == plain(native)
    assert isinstance(last, AgentRunResultEvent)
    (waiting,) = last.result.output.approvals
    assert describe(waiting) == ("tool-call", "delete", "c1", {"path": "/a"})


async def test_a_call_that_is_approved_within_the_run_is_not_left() -> None:
    async def approve(ctx: RunContext[Any], requests: DeferredToolRequests) -> DeferredToolResults:
        return requests.build_results(approve_all=True)

    agent = cautious([*call("delete", '{"path": "/a"}')], ["Done"])
    handled = HandleDeferredToolCalls[Any](handler=approve)
    await agx.run(FakeSession(), agent, "Go", ScopeDeps(), capabilities=[handled])
    found = await replayed()
    assert not any(isinstance(event, AgentRunResultEvent) for event in found)
    assert ("function_tool_result", "tool-return", "delete", "c1", "/a deleted", "success") in plain(found)


async def test_stored_messages_are_replayed_as_they_were() -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*think("hm"), "so ", *call("twice", '{"n": 2}', index=2)], ["four"]), deps_type=ScopeDeps
    )

    @agent.tool_plain
    def twice(n: int) -> int:
        return 2 * n

    watch, session = Watch(), FakeSession()
    await agx.run(session, agent, "Go", ScopeDeps(), capabilities=[watch])
    native = [event for event in watch.events if not isinstance(event, FinalResultEvent)]
    assert plain(replay_messages(session.msgs)) == plain(native)


class Answer(BaseModel):
    """A structured answer."""

    text: str


async def test_an_output_tool_is_replayed_as_one() -> None:
    agent: Agent[ScopeDeps, Answer] = Agent(
        scripted(call("final_result", '{"text"', ': "yes"}')), deps_type=ScopeDeps, output_type=Answer
    )
    native = await run_watched(agent)
    found = await replayed()
    assert plain(found) == plain(native)
    assert any(isinstance(event, OutputToolCallEvent) for event in found)


async def test_native_tools() -> None:
    calling: Delta = {0: NativeToolCallPart("web_search", {"query": "x"}, "n1", provider_name="p")}
    returned: Delta = {1: NativeToolReturnPart("web_search", {"hits": 1}, "n1", provider_name="p")}
    agent: Agent[ScopeDeps, str] = Agent(scripted([calling, returned, "found"]), deps_type=ScopeDeps)
    assert plain(await run_watched(agent)) == plain(await replayed())


async def test_tools_may_speak_to_the_front_end() -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted(call("work", "{}"), ["done"]), deps_type=ScopeDeps)

    @agent.tool
    async def work(ctx: RunContext[ScopeDeps]) -> ToolReturn:
        await ctx.deps.add_info({"progress": 0.5})
        await ctx.deps.add_error({"msg": "no such file, going on"})
        return ToolReturn("worked")

    await run_watched(agent)
    found = await replayed()
    assert [event.to_payload() for event in found if isinstance(event, InfoEvent)] == [{"progress": 0.5}]
    assert [event.to_payload() for event in found if isinstance(event, ErrorEvent)] == [
        {"msg": "no such file, going on"}
    ]


async def test_a_model_that_does_not_stream() -> None:
    def respond(messages: Any, info: Any) -> ModelResponse:
        return ModelResponse(parts=[ThinkingPart("hm"), TextPart("whole")])

    agent: Agent[ScopeDeps, str] = Agent(FunctionModel(respond), deps_type=ScopeDeps)
    await agx.run(FakeSession(), agent, "Go", ScopeDeps())
    assert [one[:3] for one in plain(await replayed())][:4] == [
        ("start", 0, "thinking"),
        ("end", 0, "thinking"),
        ("start", 1, "text"),
        ("end", 1, "text"),
    ]


async def test_a_failed_run_raises_at_its_end() -> None:
    agent = ScriptedAgent(model_error=ValueError("the model broke")).agent()
    with pytest.raises(ValueError, match="the model broke"):
        await run_watched(agent)
    found: list[AgentStreamEvent] = []
    with pytest.raises(RunFailedError, match="The run failed"):
        await read_into(found)
    assert plain(found)[0][-1] == "one "


async def test_a_cancelled_run_raises_what_pydantic_ai_raises() -> None:
    stage = ScriptedAgent(hold_after=2)
    running = asyncio.create_task(run_watched(stage.agent()))
    await stage.reached.wait()
    found: list[AgentStreamEvent] = []

    following = asyncio.create_task(read_into(found))
    await wait_until(lambda: plain(found) and plain(found)[0][-1] == "one two ")
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    with pytest.raises(RunCancelled):
        await following
    # The part is closed by the adapters, which know what was open; told anew it is the same.
    again: list[AgentStreamEvent] = []
    with pytest.raises(RunCancelled):
        await read_into(again)
    assert plain(again) == plain(found)


async def test_live_and_stored_are_one(configured: Redis) -> None:
    gate = Gate()
    agent: Agent[ScopeDeps, str] = Agent(scripted(["before ", gate, "after"]), deps_type=ScopeDeps)
    watched = asyncio.create_task(run_watched(agent))
    await gate.reached.wait()
    live: list[AgentStreamEvent] = []

    following = asyncio.create_task(read_into(live))
    await wait_until(lambda: live)
    gate.open.set()
    native = await watched
    await following
    assert plain(live) == plain(native) == plain(await replayed())


async def test_a_stream_whose_beginning_was_trimmed_is_replayed_from_its_first_entry(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted(["never ", "seen ", "anew"]), deps_type=ScopeDeps)
    await run_watched(agent)
    entries = await configured.xrange("agx:1:1:s")
    starts = next(n for n, (_, body) in enumerate(entries) if b'"part_start"' in body[b"body"])
    await configured.xtrim("agx:1:1:s", minid=entries[starts + 1][0], approximate=False)
    (start,) = [one for one in plain(await replayed()) if one[0] == "start"]
    assert start[:3] == ("start", 0, "text")
    assert start[-1] in ("seen anew", "anew")


async def test_another_run_on_the_session_ends_the_replay(configured: Redis) -> None:
    await agx.start(1, 1, "s")
    replaying = asyncio.create_task(read_into(found := []))
    await agx.add(1, 1, "s", type="info", origin="me", body={"n": 1})
    await wait_until(lambda: found)
    await configured.xadd("agx:1:1:s", {"type": "begin", "origin": "opale", "body": '{"run_id": "other"}'})
    with pytest.raises(RunFailedError, match="Another run"):
        await replaying


async def test_a_lost_run_raises_at_the_end_of_what_is_left(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted(["so ", "far"]), deps_type=ScopeDeps)
    await run_watched(agent)
    left = (await configured.xrange("agx:1:1:s"))[:-1]

    async def entries() -> AsyncIterator[StreamEntry]:
        for entry in left:
            yield StreamEntry.of(*entry)

    replaying = replay_entries(entries())
    assert isinstance(await anext(replaying), PartStartEvent)
    with pytest.raises(RunFailedError, match="lost"):
        [event async for event in replaying]


async def test_a_session_opened_by_hand_replays_what_was_added() -> None:
    await agx.start(1, 1, "s")
    await agx.add(1, 1, "s", type="info", origin="me", body={"n": 1})
    await agx.stop(1, 1, "s", grace_period=30)
    assert [event.to_payload() for event in await replayed() if isinstance(event, InfoEvent)] == [{"n": 1}]


async def test_nothing_to_replay() -> None:
    assert [event async for event in replay(1, 1, "never", wait=0.01)] == []


def test_plain_tells_texts_apart() -> None:
    """The comparison of this file can fail."""
    one = PartStartEvent(index=0, part=TextPart("a"))
    assert plain([one]) != plain([replace(one, part=TextPart("b"))])


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_stored_deltas_of_a_part_come_as_one(configured: Redis, outcome: str) -> None:
    """An adapter takes longer for an event than reading it takes; what was before a failure comes all the same."""
    bodies: list[dict[str, object]] = []
    for part, words in (("thinking", "abc"), ("text", "defg")):
        shared = {"idx": 0, "event_idx": 0, "part_kind": part}
        bodies.append({"event": "part_start", "content": "", **shared})
        bodies += [{"event": "part_delta", "content_delta": word, **shared} for word in words]
    entries = [("begin", {"run_id": "r"}), *(("event", body) for body in bodies), ("end", {"outcome": outcome})]
    for kind, body in entries:
        await configured.xadd("agx:1:1:s", {"type": kind, "origin": "opale", "body": orjson.dumps(body)})
    await configured.expire("agx:1:1:s", 60)
    found: list[Event] = []
    with contextlib.nullcontext() if outcome == "completed" else pytest.raises(RunFailedError):
        await read_into(found)
    deltas = [event.delta for event in found if isinstance(event, PartDeltaEvent)]
    assert deltas == [ThinkingPartDelta(content_delta="abc"), TextPartDelta(content_delta="defg")]
