"""The seed's README: its quick start as written, and its tables name by name, through `opale.agx`."""

from __future__ import annotations

import asyncio
import inspect
import json
from abc import ABC
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import (
    FinalResultEvent,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    SystemPromptPart,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from redis.asyncio import Redis
from support.agents import call, scripted, think
from support.recorded import check_seq, read_stream

import agx
import opale.agx
from opale.agx import (
    AgxCanceledError,
    Config,
    Deps,
    Session,
    add,
    cancel,
    configure,
    is_live,
    listen,
    q,
    run,
    start,
    stop,
)

# Names, parameters and defaults of the seed's API reference.
SIGNATURES = {
    "run": "session, agent, user_prompt, deps, **kwargs",
    "start": "scope_id, user_id, session_id",
    "stop": "scope_id, user_id, session_id, grace_period=5",
    "add": "scope_id, user_id, session_id, *, type, origin, body=None",
    "is_live": "scope_id, user_id, session_id",
    "listen": "scope_id, user_id, session_id, *, wait=3, timeout=60, serialize=True",
    "cancel": "scope_id, user_id, session_id",
    "q": "scope_id, user_id",
    "Session.load": "self",
    "Session.save": "self",
    "Session.msgs_to_json": "self",
    "Session.msgs_from_json": "self, data",
    "Session.get_user_prompt": "self",
    "Session.nodes_from_msgs": "msgs",
    "Deps.get_scope_id": "self",
    "Deps.add_node_begin": "self, node",
    "Deps.add_node_end": "self",
    "Deps.add_node_event": "self, event",
    "Deps.add_error": "self, body, origin='opale'",
    "Deps.add_info": "self, body, origin='opale'",
}


@dataclass
class MyDeps(Deps):
    def get_scope_id(self) -> int:
        return 1


@dataclass
class MySession(Session):
    id: str

    async def load(self) -> None:
        pass  # Load from your storage

    async def save(self) -> None:
        pass  # Save to your storage


def test_it_is_one_module_under_two_names() -> None:
    assert opale.agx is agx


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    found: Any = agx
    for step in name.split("."):
        found = getattr(found, step)
    # Ours may take more, behind what the seed takes, and only by name.
    taken = inspect.signature(found).parameters.values()
    shown = [
        ("**" if p.kind is p.VAR_KEYWORD else "") + p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in taken
    ]
    seed = SIGNATURES[name].split(", ")
    if "*" in seed:
        star = seed.index("*")
        assert all(p.kind is p.KEYWORD_ONLY for p in list(taken)[star:])
        seed.remove("*")
    if seed[-1].startswith("**"):
        assert shown.pop() == seed.pop()  # stands behind what is taken by name
    assert shown[: len(seed)] == seed
    assert all(p.kind is p.KEYWORD_ONLY for p in list(taken)[len(seed) : len(shown)])


def test_classes() -> None:
    assert issubclass(AgxCanceledError, Exception)
    assert issubclass(Session, ABC)
    assert issubclass(Deps, ABC)
    with pytest.raises(TypeError, match="abstract"):
        Session()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="abstract"):
        Deps(user_id=1, session_id="s")  # type: ignore[abstract]
    deps = MyDeps(user_id=1, session_id="s")
    assert (deps.user_id, deps.session_id, isinstance(deps.runtime, agx.Runtime)) == (1, "s", True)
    assert MySession(id="s").msgs == []


def test_config_is_positional_and_by_keyword() -> None:
    client = Redis()
    assert Config(client).key_prefix == "agx"
    assert (Config(client, "myapp").redis, Config(client, "myapp").key_prefix) == (client, "myapp")
    assert Config(redis=client, key_prefix="myapp").key_prefix == "myapp"


async def test_quick_start(redis_url: str) -> None:
    redis = Redis.from_url(redis_url)
    configure(Config(redis=redis))
    agent = Agent(scripted(["Hello", " you"]), deps_type=MyDeps)

    async def main() -> None:
        await run(
            MySession(id="session-1"),
            agent,
            "Hello, world!",
            deps=MyDeps(user_id=1, session_id="session-1"),
        )

    printed: list[str] = []

    async def consume() -> None:
        async for event in listen(1, 1, "session-1"):
            printed.append(event)  # noqa: PERF401 - as the seed prints it

    await asyncio.gather(consume(), main())
    events = [json.loads(event) for event in printed]
    assert (events[0]["type"], events[-1]["type"]) == ("begin", "end")
    assert "".join(e["body"].get("content", "") + e["body"].get("content_delta", "") for e in events) == "Hello you"
    await agx.aclose()
    await redis.aclose()


async def test_key_prefix_and_key_patterns(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        configure(Config(redis=client, key_prefix="myapp"))
        await start(1, 2, "s")
        assert await client.exists("myapp:1:2:s", "myapp:1:2:s:live") == 2
        await stop(1, 2, "s")
        keys: set[Any] = set(await client.keys("*"))
        assert b"myapp:1:2:s" in keys
        assert all(key.startswith(b"myapp:") for key in keys)
        await agx.aclose()


async def test_protocol_tables(configured: Redis) -> None:
    """Every row of "Stream Format", "Event Types" and "Event Body Schema"."""
    agent = Agent(
        scripted([*think("let me", " see"), *call("add", '{"a": 1,', ' "b": 2}', index=1)], ["thr", "ee"]),
        deps_type=MyDeps,
    )

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    await run(MySession(id="s"), agent, "1 + 2", deps=MyDeps(user_id=1, session_id="s"))
    entries = await read_stream(configured)
    check_seq(entries)
    assert {entry.fields for entry in entries} == {("type", "origin", "body")}
    assert (entries[0].type, entries[0].origin) == ("begin", "opale")
    assert (entries[-1].type, entries[-1].origin) == ("end", "opale")
    events = entries[1:-1]
    assert {(e.type, e.origin) for e in events} == {("event", "pydantic-ai")}
    assert {e.body["event"] for e in events} == {"llm-begin", "llm-end", "part_start", "part_delta", "answer"}
    assert all(type(e.body["idx"]) is int for e in events)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entry in events:
        if "part_kind" in entry.body:
            by_kind.setdefault(entry.body["part_kind"], []).append(entry.body)
    assert set(by_kind) == {"text", "thinking", "tool-call", "tool-return"}
    for kind in ("text", "thinking"):
        for body in by_kind[kind]:
            assert type(body["event_idx"]) is int
            assert type(body["content" if body["event"] == "part_start" else "content_delta"]) is str
    (called,), (returned,) = by_kind["tool-call"], by_kind["tool-return"]
    assert type(called["event_idx"]) is int
    assert called["args"] == {"a": 1, "b": 2}
    assert called["tool_name"] == returned["tool_name"] == "add"
    assert called["tool_call_id"] == returned["tool_call_id"] == "c1"
    # The call comes at its node's end, before its llm-end.
    said = [e.name for e in events if e.body["idx"] == 0]
    assert said.index("llm-end") == said.index("part_start", said.index("part_start") + 1) + 1


async def test_error_and_info_have_the_origin_that_is_given(configured: Redis) -> None:
    deps = MyDeps(user_id=1, session_id="s")
    await start(1, 1, "s")
    await deps.add_info({"step": 1})
    await deps.add_info({"step": 2}, "search")
    await deps.add_error({"msg": "odd"}, origin="search")
    await deps.add_error({"msg": "odd"})
    await stop(1, 1, "s")
    entries = await read_stream(configured)
    assert [(e.type, e.origin) for e in entries[1:-1]] == [
        ("info", "opale"),
        ("info", "search"),
        ("error", "search"),
        ("error", "opale"),
    ]
    check_seq(entries)


async def test_an_agent_driven_by_hand(configured: Redis) -> None:
    """start, add_node_begin, add_node_event, add_node_end, stop: what the seed's run() did, step by step."""
    deps = MyDeps(user_id=1, session_id="s")
    await start(1, 1, "s")
    for node in range(2):
        await deps.add_node_begin(node)
        await deps.add_node_event(PartStartEvent(index=0, part=TextPart("a")))
        await deps.add_node_event(PartDeltaEvent(index=0, delta=TextPartDelta("b")))
        await deps.add_node_event(PartEndEvent(index=0, part=TextPart("ab")))
        await deps.add_node_event(PartStartEvent(index=1, part=ToolCallPart("add", "", "c1")))
        await deps.add_node_event(PartEndEvent(index=1, part=ToolCallPart("add", '{"a": 1}', "c1")))
        await deps.add_node_event(FinalResultEvent(tool_name=None, tool_call_id=None))
        await deps.add_node_event("of no kind that listeners see")
        await deps.add_node_end()
    await stop(1, 1, "s", grace_period=7)
    entries = await read_stream(configured)
    check_seq(entries)
    assert [(e.name, e.body.get("idx")) for e in entries] == [
        ("begin", None),
        *(
            (said, idx)
            for idx in (0, 1)
            for said in ("llm-begin", "part_start", "part_delta", "part_start", "answer", "llm-end")
        ),
        ("end", None),
    ]
    assert entries[4].body["args"] == {"a": 1}
    assert 0 < await configured.ttl("agx:1:1:s") <= 7


async def test_live_only_between_start_and_stop(configured: Redis) -> None:
    assert not await is_live(1, 1, "s")
    await start(1, 1, "s")
    assert await is_live(1, 1, "s")
    assert [found async for found in q(1, 1)] == [(1, 1, "s")]
    assert [found async for found in q(1, 2)] == []
    assert [found async for found in q(2, 1)] == []
    await add(1, 1, "s", type="info", origin="mine", body={"a": 1})
    await add(1, 1, "s", type="info", origin="mine")
    await stop(1, 1, "s")
    assert not await is_live(1, 1, "s")
    assert [found async for found in q(1, 1)] == []
    entries = await read_stream(configured)
    assert [e.body.get("a") for e in entries if e.type == "info"] == [1, None]


async def test_cancel_tells_whether_there_was_anything_to_cancel(configured: Redis) -> None:
    assert await cancel(1, 1, "s") is False
    await start(1, 1, "s")
    assert await cancel(1, 1, "s") is True
    assert not await is_live(1, 1, "s")  # what a driver by hand looks for between two nodes
    await stop(1, 1, "s")
    assert await cancel(1, 1, "s") is False


async def test_listen_serialised_and_not(configured: Redis) -> None:
    await start(1, 1, "s")
    await add(1, 1, "s", type="info", origin="mine", body={"a": 1})
    await stop(1, 1, "s")
    texts = [event async for event in listen(1, 1, "s")]
    dicts = [event async for event in listen(1, 1, "s", serialize=False)]
    assert [json.loads(text) for text in texts] == dicts
    assert [set(event) for event in dicts] == [{"id", "type", "origin", "body"}] * 3
    assert [event["type"] for event in dicts] == ["begin", "info", "end"]
    assert [event["id"] for event in dicts] == [entry.id for entry in await read_stream(configured)]


async def test_an_entry_without_a_body_has_an_empty_one(configured: Redis) -> None:
    await configured.xadd("agx:1:1:s", {"type": "end", "origin": "peer"})
    await configured.expire("agx:1:1:s", 60)
    assert [e["body"] async for e in listen(1, 1, "s", serialize=False)] == [{}]


async def test_wait_and_timeout_end_a_listener(configured: Redis) -> None:
    assert [event async for event in listen(1, 1, "nobody", wait=0)] == []
    await start(1, 1, "s")
    assert [event["type"] async for event in listen(1, 1, "s", timeout=0, serialize=False)] == ["begin"]
    await stop(1, 1, "s")


CONVERSATION: list[ModelMessage] = [
    ModelRequest(parts=[SystemPromptPart("be kind"), UserPromptPart("first question")]),
    ModelResponse(parts=[ToolCallPart("add", {"a": 1}, "c1")]),
    ModelRequest(parts=[ToolReturnPart("add", 3, "c1")]),
    ModelResponse(parts=[TextPart("three")]),
]


def holding(msgs: list[ModelMessage]) -> MySession:
    session = MySession(id="s")
    session.msgs = msgs
    return session


def test_messages_survive_json() -> None:
    session = holding(CONVERSATION)
    data = session.msgs_to_json()
    assert isinstance(data, bytes)
    again = MySession(id="s")
    again.msgs_from_json(data)
    assert again.msgs == CONVERSATION
    with pytest.raises(ValueError):
        again.msgs_from_json(b"{not json")
    assert again.msgs == CONVERSATION


def test_user_prompt() -> None:
    assert holding(CONVERSATION).get_user_prompt() == "first question"
    assert holding([]).get_user_prompt() == "No title"
    assert holding([ModelRequest(parts=[UserPromptPart(["look", "here"])])]).get_user_prompt() == "look here"
    assert holding(CONVERSATION[1:]).get_user_prompt() == "No title"


def shape(msgs: Any) -> list[list[str]]:
    return [[part["part_kind"] for part in node["parts"]] for node in Session.nodes_from_msgs(msgs)]


def test_nodes_of_a_conversation() -> None:
    expected = [["user-prompt", "tool-call"], ["tool-return", "text"]]
    assert shape(CONVERSATION) == expected
    assert shape(ModelMessagesTypeAdapter.dump_python(CONVERSATION, mode="json")) == expected
    first = Session.nodes_from_msgs(CONVERSATION)[0]
    assert first["kind"] is None
    assert all(part["signature"] is None for part in first["parts"])


def test_nodes_of_odd_message_lists() -> None:
    """Pairs what can be paired; never nothing because one response is missing."""
    assert shape([]) == []
    assert shape(CONVERSATION[:3]) == [["user-prompt", "tool-call"], ["tool-return"]]
    assert shape(CONVERSATION[:1]) == [["user-prompt"]]
    assert shape(CONVERSATION[1:]) == [["tool-call"], ["tool-return", "text"]]
    assert shape([CONVERSATION[0], CONVERSATION[2], CONVERSATION[3]]) == [["user-prompt", "tool-return", "text"]]
    assert shape([CONVERSATION[1], CONVERSATION[3]]) == [["tool-call"], ["text"]]
    assert shape([ModelRequest(parts=[]), CONVERSATION[3]]) == [["text"]]
    assert shape([{"kind": "of another world"}, {}, {"kind": "response"}]) == [[]]
