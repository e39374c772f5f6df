"""What pydantic-ai passes on reaches listeners and replays: front ends get what upstream's own adapters send them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from ag_ui.core import EventType, RunAgentInput, StateSnapshotEvent
from pydantic_ai import Agent, BinaryContent, CustomEvent, RunContext, ToolReturn
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import CapabilityEvent, FilePart, ModelResponse, PartStartEvent, TextPart
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.run import AgentRunResultEvent
from pydantic_ai.ui.ag_ui import AGUIEventStream
from pydantic_ai.ui.vercel_ai import VercelAIEventStream
from pydantic_ai.ui.vercel_ai.response_types import DataChunk, SourceUrlChunk
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, call, scripted
from support.recorded import check_seq, read_stream

import agx
from agx.listeners.replay import replay
from agx.listeners.replayed_run import Event


@dataclass(kw_only=True)
class Progress(CustomEvent, name="progress"):
    done: int
    total: int


@dataclass(kw_only=True)
class Chart(CustomEvent, name="chart"):
    values: list[int]

    def to_payload(self) -> DataChunk:
        return DataChunk(type="data-chart", id="chart-1", data={"values": self.values})


@dataclass(kw_only=True)
class Audit(CustomEvent, name="audit", ui=False):
    secret: str


@dataclass(kw_only=True)
class Broken(CustomEvent, name="broken"):
    def to_payload(self) -> Any:
        raise RuntimeError("no payload")


@dataclass(kw_only=True)
class Saved(CapabilityEvent, namespace="agx-test"):
    place: str


@dataclass
class Saving(AbstractCapability[Any]):
    id: str | None = "saving"

    async def before_run(self, ctx: RunContext[Any]) -> None:
        await ctx.emit(Saved(place="disk"))


def make_agent() -> Agent[ScopeDeps, str]:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("draw")], ["done"]), deps_type=ScopeDeps, capabilities=[Saving()]
    )

    @agent.tool
    async def draw(ctx: RunContext[ScopeDeps]) -> ToolReturn[str]:
        await ctx.emit(Progress(done=1, total=2))
        await ctx.emit(Chart(values=[1, 2]))
        await ctx.emit(Audit(secret="never shown"))
        return ToolReturn(
            "drawn",
            metadata=[
                DataChunk(type="data-table", data={"rows": 3}),
                SourceUrlChunk(source_id="s1", url="https://example.org", title="Source"),
                StateSnapshotEvent(type=EventType.STATE_SNAPSHOT, snapshot={"drawn": True}),
                {"private": "never shown"},
            ],
        )

    return agent


async def streamed(stream: Any, events: AsyncIterator[Event]) -> list[Any]:
    """Return what a front end gets, without what differs from one run to the next."""
    names: dict[str, str] = {}
    found = []
    async for frame in stream.encode_stream(stream.transform_stream(events)):
        data = frame.removeprefix("data: ").strip()
        if data == "[DONE]":
            continue
        # An id that is made for each stream gets its place's name.
        data = re.sub(r"[0-9a-f-]{36}", lambda match: names.setdefault(match[0], f"id-{len(names)}"), data)
        chunk = json.loads(data)
        chunk.pop("timestamp", None)
        # A replay has no result of a run that completed: neither its metadata nor its finish reason.
        if chunk.get("type") == "message-metadata":
            continue
        chunk.pop("finishReason", None)
        found.append(chunk)
    return found


async def upstream(agent: Agent[ScopeDeps, str]) -> AsyncIterator[Any]:
    async with agent.run_stream_events("Go", deps=ScopeDeps()) as events:
        async for event in events:
            if not isinstance(event, AgentRunResultEvent):
                yield event


def ag_ui_stream() -> AGUIEventStream[Any, Any]:
    nothing: dict[str, Any] = {"messages": [], "tools": [], "context": [], "state": {}, "forwardedProps": {}}
    return AGUIEventStream(run_input=RunAgentInput.model_validate({"threadId": "t", "runId": "r", **nothing}))


@pytest.mark.parametrize(
    "make_stream", [lambda: VercelAIEventStream(sdk_version=6), ag_ui_stream], ids=["sdk", "ag-ui"]
)
async def test_front_ends_get_what_upstream_sends(configured: Redis, make_stream: Any) -> None:
    expected = await streamed(make_stream(), upstream(make_agent()))
    await agx.run(FakeSession(), make_agent(), "Go", ScopeDeps())
    found = await streamed(make_stream(), replay(1, 1, "s"))
    assert found == expected
    text = json.dumps(found)
    assert "never shown" not in text
    assert "drawn" in text


async def test_listeners_get_each_event_in_the_documented_schema(configured: Redis) -> None:
    await agx.run(FakeSession(), make_agent(), "Go", ScopeDeps())
    entries = await read_stream(configured)
    check_seq(entries)
    custom = [entry.body for entry in entries if entry.name == "custom"]
    assert [(body["kind"], body["name"]) for body in custom] == [
        ("capability", "agx-test.saved"),
        ("custom", "progress"),
        ("custom", "chart"),
    ]
    assert custom[0]["payload"] == {"place": "disk"}
    assert custom[1]["payload"] == {"done": 1, "total": 2}
    assert (custom[1]["tool_call_id"], custom[1]["tool_name"]) == ("c1", "draw")
    chart = {"type": "data-chart", "id": "chart-1", "data": {"values": [1, 2]}}
    assert custom[2]["chunk"] == {"protocol": "vercel-ai", "data": chart}
    assert "never shown" not in str([entry.body for entry in entries])
    (saved,) = [event async for event in replay(1, 1, "s") if isinstance(event, CapabilityEvent)]
    assert isinstance(saved, Saved)
    assert saved.place == "disk"


async def test_an_event_without_a_payload_changes_nothing(configured: Redis, caplog: pytest.LogCaptureFixture) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("fail")], ["done"]), deps_type=ScopeDeps)

    @agent.tool
    async def fail(ctx: RunContext[ScopeDeps]) -> str:
        await ctx.emit(Broken())
        return "fine"

    assert (await agx.run(FakeSession(), agent, "Go", ScopeDeps())).output == "done"
    assert "Broken can't be streamed" in caplog.text


async def test_a_small_file_is_replayed_and_a_large_one_is_not(configured: Redis) -> None:
    small, large = b"\x89PNG", b"\x00" * 200_000

    def respond(messages: Any, info: Any) -> ModelResponse:
        files = [FilePart(BinaryContent(data, media_type="image/png")) for data in (small, large)]
        return ModelResponse(parts=[*files, TextPart("two files")])

    agent: Agent[ScopeDeps, str] = Agent(FunctionModel(respond), deps_type=ScopeDeps)
    await agx.run(FakeSession(), agent, "Go", ScopeDeps())
    bodies = [entry.body for entry in await read_stream(configured) if entry.body.get("part_kind") == "file"]
    assert [(body["size"], "data" in body) for body in bodies] == [(len(small), True), (len(large), False)]
    parts = [event.part async for event in replay(1, 1, "s") if isinstance(event, PartStartEvent)]
    assert [part.content.data for part in parts if isinstance(part, FilePart)] == [small]
