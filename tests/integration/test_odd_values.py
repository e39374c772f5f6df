"""Values that are no JSON, or too much of it: they stream without a crash, in events that every reader can parse."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import uuid
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ToolReturn
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_core import PydanticSerializationError
from redis.asyncio import Redis
from support.agents import ScopeDeps, call, scripted
from support.recorded import check_seq, read_stream, text_of

import agx
from agx.stream.events import encode_body
from agx.testing import MemorySession


@dataclasses.dataclass
class Plain:
    raw: bytes
    when: datetime.date


class Model(BaseModel):
    name: str
    ratio: float


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("says nothing")


def circle() -> list[Any]:
    round_and_round: list[Any] = []
    round_and_round.append(round_and_round)
    return round_and_round


ODD: dict[str, tuple[Callable[[], Any], Any]] = {
    "bytes": (lambda: b"\xff\x00", "_wA="),
    "dataclass": (
        lambda: Plain(b"\x00", datetime.date(2026, 11, 22)),
        {"raw": "AA==", "when": "2026-11-22"},
    ),
    "model": (lambda: Model(name="a", ratio=0.5), {"name": "a", "ratio": 0.5}),
    "model with nan": (lambda: Model(name="a", ratio=float("nan")), {"name": "a", "ratio": None}),
    "datetime": (lambda: datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "2026-01-02T00:00:00+00:00"),
    "timedelta": (lambda: datetime.timedelta(days=1), "P1D"),
    "decimal": (lambda: Decimal("1.10"), "1.10"),
    "uuid": (lambda: uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "int above 64 bits": (lambda: 2**64, str(2**64)),
    "int beyond floats": (lambda: 10**400, str(10**400)),
    "int of too many digits": (lambda: 10**5_000, hex(10**5_000)),
    "infinity beside bytes": (lambda: [float("inf"), b""], [None, ""]),
    "lone surrogate": (lambda: "a\ud800b", "a?b"),
    "set": (lambda: {1}, [1]),
    "odd keys": (lambda: {1: "a", (2, 3): "b", None: "c"}, {"1": "a", "2,3": "b", "None": "c"}),
    "none": (lambda: None, None),
    "tool return": (lambda: ToolReturn(return_value={"a": 1}, content=["more"], metadata={"m": object()}), {"a": 1}),
}


def returning(make: Callable[[], Any]) -> Agent[ScopeDeps, str]:
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("make")], ["done"]), deps_type=ScopeDeps)

    @agent.tool_plain(name="make")
    def tool() -> Any:
        return make()

    return agent


@pytest.mark.parametrize("kind", ODD)
async def test_a_tool_may_return_anything(configured: Redis, kind: str) -> None:
    make, told = ODD[kind]
    session = MemorySession(id="s")
    running = asyncio.create_task(agx.run(session, returning(make), "hi", deps=ScopeDeps()))
    seen = [json.loads(event) async for event in agx.listen(1, 1, "s")]
    assert (await running).output == "done"
    (returned,) = (event["body"] for event in seen if event["body"].get("part_kind") == "tool-return")
    assert (returned["content"], returned["tool_outcome"]) == (told, "ok")
    check_seq(await read_stream(configured))
    assert b"done" in session.store["s"]


@pytest.mark.parametrize(
    ("make", "told", "kept"),
    [
        (Mute, {"unserialisable": "Mute", "error": "RuntimeError"}, True),
        (lambda: [Mute()], {"unserialisable": "list", "error": "RuntimeError"}, True),
        (circle, {"unserialisable": "list", "error": "ValueError"}, False),
    ],
    ids=["mute", "list of mutes", "circle"],
)
async def test_what_not_even_a_model_can_be_told_streams(
    configured: Redis, make: Callable[[], Any], told: dict[str, str], kept: bool
) -> None:
    session = MemorySession(id="s")
    with contextlib.suppress(PydanticSerializationError, agx.SessionSaveError):
        # Whether the run fails is pydantic-ai's affair: recent versions do not send such a value.
        await agx.run(session, returning(make), "hi", deps=ScopeDeps())
    entries = await read_stream(configured)
    check_seq(entries)
    (returned,) = (e.body for e in entries if e.body.get("part_kind") == "tool-return")
    assert (returned["content"], returned["tool_outcome"]) == (told, "ok")
    assert [e.type for e in entries].count("end") == 1
    assert isinstance(session.msgs[1], ModelResponse)  # what had been said is there, and saved where it can be
    assert ("s" in session.store) is kept


async def test_a_picture_from_a_tool_streams(configured: Redis) -> None:
    await agx.run(
        MemorySession(id="s"),
        returning(lambda: BinaryContent(data=b"\x89PNG", media_type="image/png")),
        "hi",
        deps=ScopeDeps(),
    )
    entries = await read_stream(configured)
    check_seq(entries)
    assert [e.body["tool_outcome"] for e in entries if e.body.get("part_kind") == "tool-return"] == ["ok"]


@pytest.mark.parametrize("depth", [200, 300, 900, 5_000])
async def test_deep_nesting_reaches_a_listener(configured: Redis, depth: int) -> None:
    body = f'{{"deep": {"[" * depth}{"]" * depth}}}'
    await configured.xadd("agx:1:1:s", {"type": "info", "origin": "peer", "body": body})
    await configured.xadd("agx:1:1:s", {"type": "end", "origin": "peer"})
    await configured.expire("agx:1:1:s", 60)
    events = [event async for event in agx.listen(1, 1, "s")]
    assert len(events) == 2
    assert events[0].count("[") == depth
    assert [event["type"] async for event in agx.listen(1, 1, "s", serialize=False)] == ["info", "end"]


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.decimals()
    | st.datetimes()
    | st.builds(Mute)
    | st.builds(object),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["content", "args", "tool_name", "extra"]), json_like), st.integers(128, 2_000))
def test_every_body_becomes_an_object_within_its_limit(body: dict[str, Any], limit: int) -> None:
    data = encode_body({"idx": 0, "event": "part_start", "seq": 7} | body, limit)
    told = orjson.loads(data)
    assert told.keys() - {"truncated"} == {"idx", "event", "seq"} | body.keys()
    assert (told["idx"], told["seq"]) == (0, 7)
    if isinstance(body.get("args"), dict):
        assert isinstance(told["args"], dict)
    # What nobody could cut: numbers, names, and the marks.
    assert len(data) <= limit + 200


@pytest.fixture
async def small_bodies(redis_url: str) -> AsyncIterator[Redis]:
    """agx with a `max_body` of 1 KiB."""
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(client, max_body=1_024))
        yield client
        await agx.aclose()


@pytest.mark.parametrize(
    ("value", "letter"),
    [("x" * 5_000, "x"), (["é" * 5_000], "é"), ({"k": "\x00" * 5_000}, "\\u0000")],
    ids=["str", "list", "dict"],
)
async def test_a_body_above_max_body_is_cut_and_says_so(small_bodies: Redis, value: Any, letter: str) -> None:
    await agx.run(MemorySession(id="s"), returning(lambda: value), "hi", deps=ScopeDeps())
    entries = await read_stream(small_bodies)
    check_seq(entries)
    (returned,) = (e.body for e in entries if e.body.get("part_kind") == "tool-return")
    assert returned["truncated"] is True
    assert (returned["tool_name"], returned["tool_call_id"], returned["tool_outcome"]) == ("make", "c1", "ok")
    assert returned["content"].strip('["{k:').startswith(letter)
    assert 512 < max(len(json.dumps(e.body, ensure_ascii=False).encode()) for e in entries) <= 1_100
    assert [e.name for e in entries if e.body.get("truncated")] == ["part_start"]


async def test_arguments_that_are_cut_are_an_object_still(small_bodies: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("take", json.dumps({"text": "y" * 5_000}))], ["done"]), deps_type=ScopeDeps
    )

    @agent.tool_plain
    def take(text: str) -> int:
        return len(text)

    await agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps())
    entries = await read_stream(small_bodies)
    (made,) = (e.body for e in entries if e.body.get("part_kind") == "tool-call")
    assert made["truncated"] is True
    assert made["args"]["raw"].startswith('{"text":"yyy')
    (returned,) = (e.body for e in entries if e.body.get("part_kind") == "tool-return")
    assert returned["content"] == 5_000  # the tool itself had it whole


@pytest.mark.parametrize("letter", ["a", "é", "\x01", "😀"])
async def test_merged_deltas_never_grow_above_max_body(small_bodies: Redis, letter: str) -> None:
    async def at_once(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        for _ in range(2_000):
            yield letter

    await agx.run(MemorySession(id="s"), Agent(FunctionModel(stream_function=at_once)), "hi", deps=ScopeDeps())
    entries = await read_stream(small_bodies)
    check_seq(entries)
    assert text_of(entries) == letter * 2_000
    assert not [e for e in entries if "truncated" in e.body]


async def test_bodies_added_by_hand_are_cut_too(small_bodies: Redis) -> None:
    await agx.start(1, 1, "s")
    await agx.add(1, 1, "s", type="info", origin="mine", body={"text": "z" * 5_000, "n": 1.5, "flag": True})
    await agx.stop(1, 1, "s")
    (info,) = (e.body for e in await read_stream(small_bodies) if e.type == "info")
    assert (info["truncated"], info["n"], info["flag"]) == (True, 1.5, True)
    assert set(info["text"]) == {"z"}


def hostile_keys() -> dict[Any, Any]:
    return {"bad\ud83d": 1, 5: "five", (1, 2): 3, b"\xff": None}


class Shy:
    def __repr__(self) -> str:
        raise SystemError("no")


@pytest.mark.parametrize(
    "body",
    [
        hostile_keys(),
        {"a": hostile_keys()},
        {"a": float("nan"), "b": float("-inf"), "\ud800": "\udfff"},
        {"a": 10**5_000, "b": [2**64, -(2**63) - 1]},
        {"a": Shy(), "b": Shy},
        {"args": circle()},
        {"a" * 5_000: 1},
        {f"name-{n}": n for n in range(1_000)},
        {"tool_name": "x" * 5_000, "args": {"n": 10**5_000}},
    ],
    ids=["keys", "nested keys", "floats", "integers", "objects", "circle", "long name", "many names", "long"],
)
def test_any_body_is_encoded_within_its_limit(body: dict[Any, Any]) -> None:
    for limit in (1_024, 1_000_000):
        data = encode_body(body, limit)
        assert isinstance(orjson.loads(data), dict)
        assert len(data) <= limit + 64


async def test_integers_that_javascript_would_round_stay_exact(configured: Redis) -> None:
    exact, beyond, huge = 2**53 - 1, 2**53, 123456789012345678901234567890
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("count", f'{{"a": {exact}, "b": {beyond}, "c": {huge}}}')], ["done"]), deps_type=ScopeDeps
    )

    @agent.tool_plain
    def count(a: int, b: int, c: int) -> list[int]:
        return [a, b, c]

    await agx.run(MemorySession(id="s"), agent, "Go", ScopeDeps())
    bodies = [entry.body for entry in await read_stream(configured)]
    (made,) = [body for body in bodies if body.get("part_kind") == "tool-call"]
    assert made["args"] == {"a": exact, "b": str(beyond), "c": str(huge)}
    (returned,) = [body for body in bodies if body.get("part_kind") == "tool-return"]
    assert returned["content"] == [exact, str(beyond), str(huge)]
