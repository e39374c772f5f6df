"""Turns of a stored conversation that others use at the same time, and what a page that is opened then gets to see."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from support.agents import Gate, ScopeDeps, ScriptedAgent, call, scripted

import agx
from agx.errors import ConversationChangedError
from agx.redis.keys import Id
from agx.sessions.base import Session, StoredSession
from agx.testing import collect
from agx.web.history import read_conversation
from agx.web.runs import Runs, Who, make_plain_deps
from agx.web.turns import (
    ask,
    ask_again,
    close_calls,
    decide,
    pending_calls,
)

pytestmark = pytest.mark.usefixtures("configured")

ADA = Who(1, 1)
Hook = Callable[[], Awaitable[object]]


async def nothing() -> None:
    """Do nothing."""


@dataclass
class Store:
    """Conversations that are kept in memory; a test may do something behind a `load()` and behind a `save()`."""

    kept: dict[str, bytes] = field(default_factory=dict)
    loaded: Hook = nothing
    saved: Hook = nothing

    def open(self, scope_id: Id, user_id: Id, session_id: Id, *, parent: Id | None = None) -> Session:
        return Stored(self, str(session_id))

    async def list(self, *ids: Any, **page: Any) -> list[StoredSession]:
        raise NotImplementedError


@dataclass
class Stored(Session):
    store: Store
    id: str

    async def load(self) -> None:
        self.msgs_from_json(self.store.kept.get(self.id, b"[]"))
        hook, self.store.loaded = self.store.loaded, nothing
        await hook()

    async def save(self) -> None:
        self.store.kept[self.id] = self.msgs_to_json()
        await self.store.saved()


def runs(store: Store, *replies: Any) -> Runs:
    """Return the runs of an agent that says these replies and may delete once it is allowed to."""
    agent: Agent[ScopeDeps, Any] = Agent(scripted(*replies), output_type=[str, DeferredToolRequests])

    @agent.tool_plain(requires_approval=True)
    def delete(path: str) -> str:
        return f"{path} deleted"

    return Runs(agent, store, make_plain_deps, {})


def said(messages: list[ModelMessage]) -> list[Any]:
    return [part.content for message in messages for part in message.parts if hasattr(part, "content")]


async def until_streamed(text: str) -> None:
    """Wait until the session's stream holds a text."""
    async for event in agx.listen(1, 1, "s"):
        if text in event:
            return
    raise AssertionError(f"{text!r} never came")


async def test_a_run_that_ends_while_its_page_is_read_is_still_there_to_resume() -> None:
    gate, store = Gate(), Store()
    made = runs(store, ["half ", gate, "and half"])
    run_id = await made.start(ADA, "s", ask("Hi"))
    await until_streamed("half ")

    async def let_it_end() -> None:
        gate.open.set()
        await collect(1, 1, "s")

    store.loaded = let_it_end
    found = await read_conversation(store, ADA, "s")
    assert (said(found.session.msgs), found.live, found.run_id) == (["Hi"], True, run_id)


async def test_a_run_that_is_saved_but_has_not_ended_is_shown_once() -> None:
    saved, may_end, store = asyncio.Event(), asyncio.Event(), Store()

    async def hold() -> None:
        saved.set()
        await may_end.wait()

    store.saved = hold
    await runs(store, ["Hello"]).start(ADA, "s", ask("Hi"))
    await saved.wait()
    found = await read_conversation(store, ADA, "s")
    assert (said(found.session.msgs), found.live) == (["Hi", "Hello"], False)
    may_end.set()
    await collect(1, 1, "s")


async def test_of_two_that_ask_again_at_once_one_is_refused() -> None:
    gate, store = Gate(), Store()
    made = runs(store, ["One"], [gate, "Two"])
    await made.start(ADA, "s", ask("Hi"))
    await collect(1, 1, "s")
    tries = await asyncio.gather(*(made.start(ADA, "s", ask_again("Hi")) for _ in range(2)), return_exceptions=True)
    assert sorted(type(one).__name__ for one in tries) == ["SessionBusyError", "str"]
    await until_streamed("prompt")
    found = await read_conversation(store, ADA, "s")
    assert (said(found.session.msgs), found.live) == (["Hi"], True)
    gate.open.set()
    await collect(1, 1, "s")
    assert said((await read_conversation(store, ADA, "s")).session.msgs) == ["Hi", "Two"]


async def test_a_decision_that_came_second_runs_nothing() -> None:
    store = Store()
    made = runs(store, ["I will", *call("delete", '{"path": "/a"}', index=1)], ["Done"], ["never"])
    await made.start(ADA, "s", ask("Delete"))
    await collect(1, 1, "s")
    approved = decide(DeferredToolResults(approvals={"c1": True}), {})

    async def be_overtaken() -> None:
        await made.start(ADA, "s", approved)
        await collect(1, 1, "s")

    # Looked at and found right, then another one comes between: it is looked at again.
    store.loaded = be_overtaken
    with pytest.raises(ConversationChangedError, match="load it again"):
        await made.start(ADA, "s", approved)
    found = await read_conversation(store, ADA, "s")
    assert said(found.session.msgs) == ["Delete", "I will", "/a deleted", "Done"]


@pytest.mark.parametrize("ids", [(), ("c2",), ("c1", "c2")])
async def test_only_what_awaits_a_decision_is_decided_on(ids: tuple[str, ...]) -> None:
    store = Store()
    made = runs(store, [*call("delete", '{"path": "/a"}')])
    await made.start(ADA, "s", ask("Delete"))
    await collect(1, 1, "s")
    with pytest.raises(ConversationChangedError):
        await made.start(ADA, "s", decide(DeferredToolResults(approvals=dict.fromkeys(ids, True)), {}))
    with pytest.raises(ConversationChangedError):
        await made.start(ADA, "other", ask_again("Delete"))
    with pytest.raises(ConversationChangedError):
        await made.start(ADA, "s", ask_again("Something else"))


async def test_a_call_that_was_cut_off_does_not_await_a_decision() -> None:
    store, stage = Store(), ScriptedAgent(call_tool=True, hold_tool=True)
    cut_off = Runs(stage.agent(), store, make_plain_deps, {})
    await cut_off.start(ADA, "s", ask("Work"))
    await stage.reached.wait()
    await agx.cancel(1, 1, "s")
    await collect(1, 1, "s")
    found = await read_conversation(store, ADA, "s")
    assert pending_calls(found.session.msgs) == {}
    (told,) = [part for message in found.session.msgs for part in message.parts if isinstance(part, ToolReturnPart)]
    assert (told.tool_call_id, told.outcome) == ("call-1", "interrupted")
    await runs(store, ["Fine"]).start(ADA, "s", ask("And now?"))
    await collect(1, 1, "s")
    assert said((await read_conversation(store, ADA, "s")).session.msgs)[-2:] == ["And now?", "Fine"]


ASKED = ModelRequest(parts=[UserPromptPart("Hi")])
CALLED = ModelResponse(parts=[ToolCallPart("a", {}, "1"), ToolCallPart("b", {}, "2")])
ONE_BACK = ModelRequest(parts=[ToolReturnPart("a", "done", "1")])


def interrupted(message: ModelRequest | ModelResponse) -> ModelMessage:
    return type(message)(parts=message.parts, state="interrupted")  # type: ignore[arg-type] # of the same type


@pytest.mark.parametrize(
    ("messages", "pending"),
    [
        ([], []),
        ([ASKED], []),
        ([ASKED, CALLED], ["1", "2"]),
        ([ASKED, CALLED, ONE_BACK], ["2"]),
        ([ASKED, interrupted(CALLED)], []),
        ([ASKED, CALLED, interrupted(ONE_BACK)], []),
        ([ASKED, CALLED, ModelRequest(parts=[], state="interrupted")], []),
        ([ASKED, CALLED, ASKED], []),
        ([ASKED, CALLED, ONE_BACK, ModelResponse(parts=[TextPart("Bye")])], []),
    ],
)
def test_calls_await_a_decision_at_the_end_of_a_conversation_that_was_not_cut_off(
    messages: list[ModelMessage], pending: list[str]
) -> None:
    assert list(pending_calls(messages)) == pending
    closed = close_calls(messages)
    assert list(pending_calls(closed)) == pending
    called = {call.tool_call_id for one in closed if isinstance(one, ModelResponse) for call in one.tool_calls}
    returned = [part.tool_call_id for one in closed for part in one.parts if isinstance(part, ToolReturnPart)]
    assert sorted([*returned, *pending]) == sorted(called)
