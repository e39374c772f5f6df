"""What of a turn is stored: the prompt from its start, then what pydantic-ai's `all_messages()` gives (contract, 3)."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, UserPromptPart
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine
from support.agents import FakeSession, ScopeDeps, ScriptedAgent, call, scripted
from support.chat_service import serve
from support.forked import Forked
from support.waiting import wait_until

import agx
from agx.sessions.base import SessionStore
from agx.sessions.redis_session import RedisSessions
from agx.sessions.sql_session import SqlSessions
from agx.web.history import read_conversation
from agx.web.runs import Runs, Who
from agx.web.turns import ask, ask_again


@pytest.fixture(params=["redis", "sqlite"])
async def store_and_url(
    request: pytest.FixtureRequest, configured: Redis, tmp_path: Path
) -> AsyncIterator[tuple[SessionStore, str | None]]:
    if request.param == "redis":
        yield RedisSessions(ttl=60), None
        return
    url = f"sqlite+aiosqlite:///{tmp_path / 'chats.sqlite'}"
    engine = create_async_engine(url)
    store = SqlSessions(engine)
    await store.create_table()
    yield store, url
    await engine.dispose()


def texts(messages: list[ModelMessage]) -> list[str]:
    return [str(part.content) for message in messages for part in message.parts if hasattr(part, "content")]


async def kill_service(redis_url: str, database: str | None, home: Path) -> None:
    """Start a run in a service of its own, and kill that when half of the answer is on the stream."""
    service = Forked(serve, redis_url, database, log=home / "service.log")
    await wait_until(lambda: service.said == "reached\n", what=f"half of the answer: {service.said}")
    service.end(signal.SIGKILL)

    async def is_free() -> bool:
        return not await agx.is_live(1, 1, "s")

    await wait_until(is_free)


async def stored(store: SessionStore) -> list[str]:
    session = store.open(1, 1, "s")
    await session.load()
    return texts(session.msgs)


async def test_a_prompt_survives_the_process_and_its_stream(
    store_and_url: tuple[SessionStore, str | None], configured: Redis, redis_url: str, tmp_path: Path
) -> None:
    store, url = store_and_url
    await kill_service(redis_url, url, tmp_path)
    await configured.delete("agx:1:1:s")  # as after its expiry
    (listed,) = await store.list(1, 1)
    assert (listed.session_id, listed.title) == ("s", "Is it kept?")
    assert await stored(store) == ["Is it kept?"]
    seen: list[list[str]] = []

    def keep(messages: list[ModelMessage]) -> list[ModelMessage]:
        seen.append(texts(messages))
        return messages

    agent = ScriptedAgent().agent(capabilities=[ProcessHistory(keep)])
    await agx.run(store.open(1, 1, "s"), agent, "And now?", ScopeDeps())
    assert seen == [["Is it kept?", "And now?"]]
    assert await stored(store) == ["Is it kept?", "And now?", "one two three"]


async def test_what_a_lost_run_answered_is_shown_and_stored_with_the_next_turn(
    store_and_url: tuple[SessionStore, str | None], configured: Redis, redis_url: str, tmp_path: Path
) -> None:
    store, url = store_and_url
    await kill_service(redis_url, url, tmp_path)
    found = await read_conversation(store, Who(1, 1), "s")
    assert texts(found.session.msgs) == ["Is it kept?", "one two "]
    assert not found.live
    runs = Runs(ScriptedAgent().agent(), store, lambda *ids: ScopeDeps(), {})
    await runs.start(Who(1, 1), "s", ask("And now?"))
    assert [event["type"] async for event in agx.listen(1, 1, "s", serialize=False)][-1] == "end"
    assert await stored(store) == ["Is it kept?", "one two ", "And now?", "one two three"]


async def test_a_lost_prompt_is_asked_again_and_stored_once(
    store_and_url: tuple[SessionStore, str | None], configured: Redis, redis_url: str, tmp_path: Path
) -> None:
    store, url = store_and_url
    await kill_service(redis_url, url, tmp_path)
    assert (await read_conversation(store, Who(1, 1), "s")).lost is None
    runs = Runs(ScriptedAgent().agent(), store, lambda *ids: ScopeDeps(), {})
    await runs.start(Who(1, 1), "s", ask_again("Is it kept?"))
    assert [event["type"] async for event in agx.listen(1, 1, "s", serialize=False)][-1] == "end"
    assert await stored(store) == ["Is it kept?", "one two three"]


async def test_a_prompt_that_a_history_processor_drops_is_stored(configured: Redis) -> None:
    agent: Agent[ScopeDeps, str] = Agent(
        scripted([*call("look")], ["done"]),
        deps_type=ScopeDeps,
        capabilities=[ProcessHistory(lambda messages: messages[-2:])],
    )

    @agent.tool_plain
    def look() -> str:
        return "seen"

    session = FakeSession()
    result = await agx.run(session, agent, "What is there?", ScopeDeps())
    assert "What is there?" not in texts(result.all_messages())  # so it is upstream's
    assert texts(session.msgs) == ["What is there?", "seen", "done"]
    assert session.msgs[1:] == result.all_messages()


async def test_a_prompt_that_a_history_processor_edits_is_stored_once(configured: Redis) -> None:
    def redact(messages: list[ModelMessage]) -> list[ModelMessage]:
        for message in messages:
            if isinstance(message, ModelRequest):
                message.parts = [replace(one, content="(redacted)") for one in message.parts if hasattr(one, "content")]
        return messages

    session = FakeSession()
    await agx.run(session, ScriptedAgent().agent(capabilities=[ProcessHistory(redact)]), "My pin is 1234", ScopeDeps())
    assert texts(session.msgs) == ["(redacted)", "one two three"]


async def test_a_summary_is_stored_and_not_made_again_each_turn(configured: Redis) -> None:
    summarised: list[int] = []

    def summarise(messages: list[ModelMessage]) -> list[ModelMessage]:
        if len(messages) <= 4:
            return messages
        summarised.append(len(messages))
        return [ModelRequest(parts=[UserPromptPart("summary")]), *messages[-1:]]

    agent = ScriptedAgent().agent(capabilities=[ProcessHistory(summarise)])
    session = FakeSession()
    for turn in range(8):
        result = await agx.run(session, agent, f"turn {turn}", ScopeDeps())
        assert session.msgs == result.all_messages()
        assert f"turn {turn}" in texts(session.msgs)
    assert set(summarised) == {5}


async def test_a_message_history_takes_the_conversation_s_place_and_is_stored(configured: Redis) -> None:
    session = FakeSession(msgs=[ModelRequest(parts=[UserPromptPart("forgotten")])])
    history: list[Any] = [ModelRequest(parts=[UserPromptPart("before")]), ModelResponse(parts=[TextPart("yes")])]
    await agx.run(session, ScriptedAgent().agent(), "now", ScopeDeps(), message_history=history)
    assert texts(session.msgs) == ["before", "yes", "now", "one two three"]
    assert texts(history) == ["before", "yes"]


async def test_a_store_that_cannot_take_the_prompt_runs_nothing(configured: Redis) -> None:
    class Full(FakeSession):
        async def begin(self, request: ModelRequest) -> None:
            raise OSError("full")

    session, agent = Full(), ScriptedAgent()
    with pytest.raises(OSError, match="full"):
        await agx.run(session, agent.agent(), "now", ScopeDeps())
    assert session.saves == 0
