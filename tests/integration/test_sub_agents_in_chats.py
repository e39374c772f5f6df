"""What sub-agents do, in the two chat protocols: as a page of each gets it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from ag_ui.core import RunAgentInput
from pydantic_ai.ui.vercel_ai.response_types import BaseChunk, ToolOutputAvailableChunk
from redis.asyncio import Redis
from support.agents import ScopeDeps
from support.delegating import delegating, observed

import agx
from agx.listeners.replay import replay, replay_entries
from agx.stream.entry import StreamEntry
from agx.testing import MemorySession
from agx.web.sub_agents.ag_ui import ThreadEventStream
from agx.web.sub_agents.vercel_ai import ChatEventStream

CALLS = [f"call-{n}" for n in range(3)]


async def run_with_sub_agents() -> None:
    """Run an agent that asks three others at once, each of which asks three more."""
    middle = delegating("middle", delegating("leaf", **observed()), calls=3, **observed())
    await agx.run(MemorySession(id="s"), delegating("top", middle, calls=3), "q", deps=ScopeDeps())


def texts(message: dict[str, Any]) -> list[str]:
    return [part["text"] for part in message["parts"] if part["type"] == "text"]


async def test_a_page_with_the_ai_sdk_shows_them_in_the_tool_call(configured: Redis) -> None:
    await run_with_sub_agents()
    chunks: list[BaseChunk] = []
    last: dict[str, dict[str, Any]] = {}  # of each call: the last preliminary output
    async for chunk in ChatEventStream(sdk_version=7).transform_stream(replay(1, 1, "s")):
        chunks.append(chunk)
        if isinstance(chunk, ToolOutputAvailableChunk) and chunk.preliminary:
            last[chunk.tool_call_id] = orjson.loads(chunk.encode(7))["output"]
    assert sorted(last) == CALLS
    for n, call_id in enumerate(CALLS):
        message = last[call_id]
        assert texts(message) == [f"middle answers q{n}"]
        head, *calls = [part for part in message["parts"] if part["type"] != "text"]
        assert (head["type"], head["data"]["agent"], head["data"]["depth"]) == ("data-agx-sub-agent", "middle", 1)
        assert head["data"]["outcome"] == "completed"
        # The results of its own calls have replaced what the next level did.
        assert [call["output"] for call in calls] == [f"leaf answers q{n}{m}" for m in range(3)]
    final = [chunk for chunk in chunks if isinstance(chunk, ToolOutputAvailableChunk) and not chunk.preliminary]
    assert sorted((chunk.tool_call_id, chunk.output) for chunk in final) == [
        (call_id, f"middle answers q{n}") for n, call_id in enumerate(CALLS)
    ]
    deltas = "".join(getattr(chunk, "delta", "") for chunk in chunks if type(chunk).__name__ == "TextDeltaChunk")
    assert deltas == "top answers q"


async def test_the_next_level_is_in_a_preliminary_output_of_its_own(configured: Redis) -> None:
    await run_with_sub_agents()
    seen = set()
    async for chunk in ChatEventStream(sdk_version=7).transform_stream(replay(1, 1, "s")):
        if isinstance(chunk, ToolOutputAvailableChunk) and chunk.preliminary:
            for part in chunk.output["parts"]:
                if part.get("preliminary"):
                    seen.update((chunk.tool_call_id, part["toolCallId"], text) for text in texts(part["output"]))
    whole = {(root, leaf, f"leaf answers q{n}{m}") for n, root in enumerate(CALLS) for m, leaf in enumerate(CALLS)}
    assert whole <= seen


def _entries(kinds: Iterable[tuple[str, dict[str, Any]]]) -> list[StreamEntry]:
    origins = {"event": "pydantic-ai", "sub": "sub-agent"}
    return [
        StreamEntry((1_000 + n, 0), "event" if kind == "sub" else kind, origins.get(kind, "opale"), orjson.dumps(body))
        for n, (kind, body) in enumerate(kinds)
    ]


TAGS = {"parent_run": "r", "agent": "scout", "parent_tool_call_id": "c", "depth": 1}
LONG = 20_000  # deltas
ASK = {"tool_name": "ask", "tool_call_id": "c", "args": {}}
CALLING: list[tuple[str, dict[str, Any]]] = [
    ("begin", {"run_id": "r"}),
    ("event", {"idx": 0, "event": "llm-begin"}),
    ("event", {"idx": 0, "event": "part_start", "part_kind": "tool-call", **ASK}),
    ("event", {"idx": 0, "event": "llm-end"}),
]  # fmt: skip


async def _stored(entries: list[StreamEntry]) -> Any:
    for entry in entries:
        yield entry


async def test_a_long_text_costs_a_multiple_of_its_length(configured: Redis) -> None:
    text = {"idx": 0, "part_kind": "text", "run": "a", **TAGS}
    deltas = [("sub", text | {"event": "part_delta", "content_delta": "word "})] * LONG
    entries = _entries([*CALLING, ("sub", text | {"event": "part_start", "content": ""}), *deltas, ("end", {})])
    size = 0
    async for chunk in ChatEventStream(sdk_version=7).transform_stream(replay_entries(_stored(entries))):
        size += len(chunk.encode(7)) if isinstance(chunk, ToolOutputAvailableChunk) else 0
    assert 5 * LONG < size < 100 * 5 * LONG


async def test_what_a_dead_process_had_begun_is_replaced(configured: Redis) -> None:
    def text(run: str, content: str) -> tuple[str, dict[str, Any]]:
        return "sub", {"idx": 0, "event": "part_start", "part_kind": "text", "content": content, "run": run, **TAGS}

    entries = _entries(
        [*CALLING, text("a", "void"), ("resume", {"void": None, "void_runs": ["a"]}), text("b", "new"), ("end", {})]
    )
    shown = [
        texts(orjson.loads(chunk.encode(7))["output"])
        async for chunk in ChatEventStream(sdk_version=7).transform_stream(replay_entries(_stored(entries)))
        if isinstance(chunk, ToolOutputAvailableChunk)
    ]
    assert ["void"] in shown
    assert shown[-1] == ["new"]


def _input(version: str | None) -> RunAgentInput:
    asked = {"thread_id": "t", "run_id": "r", "state": {}, "messages": [], "tools": [], "context": []}
    return RunAgentInput(**asked, forwarded_props={}, protocol_version=version)


@pytest.mark.parametrize("version", ["1.0", "2.1"])
async def test_ag_ui_gives_each_step_to_its_sub_agent(configured: Redis, version: str) -> None:
    await run_with_sub_agents()
    said: dict[str | None, str] = {}
    started: dict[str, Any] = {}
    ended: list[str] = []
    async for event in ThreadEventStream(run_input=_input(version)).transform_stream(replay(1, 1, "s")):
        one = event.model_dump(mode="json", exclude_none=True)
        run = one.get("subagent_run_id")
        if one["type"] == "SUBAGENT_STARTED":
            started[run] = one
        elif one["type"] == "SUBAGENT_FINISHED":
            ended.append(run)
        elif one["type"] == "TEXT_MESSAGE_CONTENT":
            said[run] = said.get(run, "") + one["delta"]
        assert run is None or (run in started and (run not in ended or one["type"] == "SUBAGENT_FINISHED"))
    assert len(started) == 12
    assert sorted(ended) == sorted(started)
    assert said.pop(None) == "top answers q"
    for run, one in started.items():
        parent = started.get(one.get("parent_subagent_run_id", ""))
        n = CALLS.index(one["parent_tool_call_id"])
        above = "" if parent is None else CALLS.index(parent["parent_tool_call_id"])
        assert said[run] == f"{one['name']} answers q{above}{n}"
        assert (one["name"], parent is None) in (("middle", True), ("leaf", False))


@pytest.mark.parametrize("version", [None, "0.9"])
async def test_a_client_of_ag_ui_before_1_0_gets_the_run_alone(configured: Redis, version: str | None) -> None:
    await run_with_sub_agents()
    events = [event async for event in ThreadEventStream(run_input=_input(version)).transform_stream(replay(1, 1, "s"))]
    assert not any("SUBAGENT" in event.type or getattr(event, "subagent_run_id", None) for event in events)
    assert (
        "".join(getattr(event, "delta", "") for event in events if event.type == "TEXT_MESSAGE_CONTENT")
        == "top answers q"
    )


async def test_ag_ui_gets_the_end_of_sub_agents_that_a_resume_made_void(configured: Redis) -> None:
    text = {"idx": 0, "event": "part_start", "part_kind": "text", "content": "x", "run": "a", **TAGS}
    entries = _entries([*CALLING, ("sub", text), ("resume", {"void": None, "void_runs": ["a"]}), ("end", {})])
    stream = ThreadEventStream(run_input=_input("1.0"))
    events = [event async for event in stream.transform_stream(replay_entries(_stored(entries)))]
    kinds = [event.type.value for event in events if getattr(event, "subagent_run_id", None)]
    assert kinds == [
        "SUBAGENT_STARTED",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "SUBAGENT_ERROR",
    ]
