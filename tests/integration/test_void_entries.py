"""What a `resume` makes void is not replayed, or is retracted where it was given before; streams made by hand."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from pydantic_ai.messages import (
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelResponse,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.ui.vercel_ai import VercelAIEventStream
from redis.asyncio import Redis

import agx
from agx.listeners.replay import replay, replay_entries
from agx.listeners.replayed_run import Event
from agx.listeners.void import ResumeEvent
from agx.sessions.lost_answer import read_lost_answer
from agx.stream.entry import StreamEntry

Made = tuple[str, dict[str, Any]]


def event(idx: int, what: str, **fields: Any) -> Made:
    return "event", {"idx": idx, "event": what, **fields}


def text(idx: int, first: str, *rest: str) -> list[Made]:
    start = event(idx, "part_start", event_idx=0, part_kind="text", content=first)
    more = [event(idx, "part_delta", event_idx=0, part_kind="text", content_delta=delta) for delta in rest]
    return [start, *more]


def call(idx: int, call_id: str) -> Made:
    made = {"part_kind": "tool-call", "tool_name": "look", "args": {}, "tool_call_id": call_id}
    return event(idx, "part_start", event_idx=1, **made)


def returned(idx: int, call_id: str) -> Made:
    made = {"part_kind": "tool-return", "tool_name": "look", "content": 1, "tool_call_id": call_id}
    return event(idx, "part_start", event_idx=0, **made)


BEGIN: Made = ("begin", {"run_id": "r", "agent": "support", "recover": 60, "max_attempts": 3})
END: Made = ("end", {"outcome": "completed"})


def resume(attempt: int, idx: int | None, from_seq: int = 0) -> Made:
    return "resume", {"run_id": "r", "attempt": attempt, "void": idx and {"idx": idx, "from_seq": from_seq}}


# A tool call, then a void response with a text and a call (numbers 5 to 8), and the same request asked again.
RUN: list[Made] = [
    BEGIN,
    event(0, "llm-begin"), call(0, "a"), event(0, "llm-end"), returned(0, "a"),
    event(1, "llm-begin"), *text(1, "Hel", "lo"), call(1, "void"),
    resume(2, 1, 5),
    event(2, "llm-begin"), *text(2, "Good", " day"), event(2, "llm-end"),
    END,
]  # fmt: skip

BEFORE = [
    PartStartEvent(index=1, part=ToolCallPart("look", {}, "a")),
    PartEndEvent(index=1, part=ToolCallPart("look", {}, "a")),
    FunctionToolCallEvent(ToolCallPart("look", {}, "a"), args_valid=True),
    FunctionToolResultEvent(ToolReturnPart("look", 1, "a")),
]
VOID = [
    PartStartEvent(index=0, part=TextPart("Hel")),
    PartDeltaEvent(index=0, delta=TextPartDelta("lo")),
    PartEndEvent(index=0, part=TextPart("Hello"), next_part_kind="tool-call"),
    PartStartEvent(index=1, part=ToolCallPart("look", {}, "void"), previous_part_kind="text"),
    PartEndEvent(index=1, part=ToolCallPart("look", {}, "void")),
    ResumeEvent(body={"attempt": 2, "void": {"idx": 1, "from_seq": 5}, "tool_call_ids": ["void"]}),
]
AFTER = [
    PartStartEvent(index=0, part=TextPart("Good")),
    PartDeltaEvent(index=0, delta=TextPartDelta(" day")),
    PartEndEvent(index=0, part=TextPart("Good day")),
]


def entries(made: list[Made]) -> list[StreamEntry]:
    first_ms = int(time.time() * 1_000) - len(made)
    return [
        StreamEntry(
            (first_ms + seq, 0),
            kind,
            "pydantic-ai" if kind == "event" else "opale",
            orjson.dumps({**body, "seq": seq}),
        )
        for seq, (kind, body) in enumerate(made)
    ]


async def store(client: Redis, made: list[Made]) -> None:
    for entry in entries(made):
        fields: dict[Any, Any] = {"type": entry.type, "origin": entry.origin, "body": entry.raw_body}
        await client.xadd("agx:1:1:s", fields, id=f"{entry.id[0]}-0")
    await client.expire("agx:1:1:s", 60)


async def live() -> AsyncIterator[StreamEntry]:
    for entry in entries(RUN):
        yield entry


def plain(events: list[Any]) -> list[Any]:
    """Return events without their times."""
    found = []
    for one in events:
        for part in (getattr(one, "part", None), getattr(one, "result", None)):
            if part is not None and hasattr(part, "timestamp"):
                part.timestamp = None
        found.append(one)
    return found


async def test_a_stored_run_is_replayed_without_what_is_void(configured: Redis) -> None:
    await store(configured, RUN)
    assert plain([one async for one in replay(1, 1, "s")]) == plain([*BEFORE, *AFTER])


async def test_what_was_given_before_is_ended_and_named(configured: Redis) -> None:
    assert plain([one async for one in replay_entries(live())]) == plain([*BEFORE, *VOID, *AFTER])


async def test_an_open_text_is_ended(configured: Redis) -> None:
    async def made() -> AsyncIterator[StreamEntry]:
        for entry in entries([BEGIN, event(0, "llm-begin"), *text(0, "Hel"), resume(2, None), END]):
            yield entry

    given = [one async for one in replay_entries(made())]
    assert given == [PartStartEvent(index=0, part=TextPart("Hel")), PartEndEvent(index=0, part=TextPart("Hel"))]


async def test_the_ai_sdk_gets_two_texts_and_a_data_part_between(configured: Redis) -> None:
    async def events() -> AsyncIterator[Event]:
        async for one in replay_entries(live()):
            yield one

    stream: VercelAIEventStream[Any, Any] = VercelAIEventStream(sdk_version=6)
    chunks = [chunk.model_dump(by_alias=True) async for chunk in stream.transform_stream(events())]
    types = [chunk["type"] for chunk in chunks]
    ends = [n for n, kind in enumerate(types) if kind == "text-end"]
    starts = [n for n, kind in enumerate(types) if kind == "text-start"]
    data = types.index("data-agx-resume")
    assert starts[0] < ends[0] < data < starts[1] < ends[1]
    assert chunks[starts[0]]["id"] != chunks[starts[1]]["id"]
    assert chunks[data]["data"] == {"attempt": 2, "void": {"idx": 1, "from_seq": 5}, "tool_call_ids": ["void"]}


async def test_of_a_lost_run_s_answer_no_void_text_is_left(configured: Redis) -> None:
    lost: Made = ("end", {"outcome": "lost"})
    await store(configured, [*RUN[:-2], lost])
    messages = await read_lost_answer(1, 1, "s")
    texts = [part.content for message in messages if isinstance(message, ModelResponse) for part in message.parts
             if isinstance(part, TextPart)]  # fmt: skip
    assert texts == ["Good day"]


async def test_listeners_get_the_entries_as_they_are(configured: Redis) -> None:
    await store(configured, RUN)
    listened = [one async for one in agx.listen(1, 1, "s", serialize=False)]
    assert [one["type"] for one in listened] == [kind for kind, _ in RUN]
    behind = [one async for one in agx.listen(1, 1, "s", serialize=False, after=listened[6]["id"])]
    assert behind == listened[7:]  # a cursor inside of what is void


@pytest.mark.parametrize("void", [7, {"idx": "1"}, {"idx": 1}, []])
async def test_a_resume_that_cannot_be_read_makes_nothing_void(configured: Redis, void: Any) -> None:
    made = [*RUN]
    made[9] = ("resume", {"attempt": 2, "void": void})
    await store(configured, made)
    given = [one async for one in replay(1, 1, "s")]
    assert sum(isinstance(one, PartStartEvent) and isinstance(one.part, TextPart) for one in given) == 2
