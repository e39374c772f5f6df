"""A failed run: listeners get a sentence and a code, the log gets the exception, once (contract, section 3)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from pydantic_ai import Agent
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine
from support.agents import FakeSession, ScopeDeps, ScriptedAgent, call, scripted
from support.recorded import read_facts, read_stream

import agx
from agx.config import current_config
from agx.runs.outcome import describe_text
from agx.sessions.sql_session import SqlSessions

SECRET = "could not connect to postgres://admin:secret@db"


def failing_agent() -> Agent[ScopeDeps, str]:
    agent: Agent[ScopeDeps, str] = Agent(scripted([*call("look_up")]), deps_type=ScopeDeps, name="helper")

    @agent.tool_plain
    def look_up() -> str:
        raise ConnectionError(SECRET)

    return agent


async def fail(client: Redis, describe_error: Callable[[BaseException], str] | None = None) -> dict[str, Any]:
    """Run an agent whose tool raises; return the body of the `error` event."""
    settings = current_config()
    agx.configure(agx.Config(settings.redis, key_prefix=settings.key_prefix, describe_error=describe_error))
    with pytest.raises(ConnectionError, match="secret"):
        await agx.run(FakeSession(), failing_agent(), "Hi", ScopeDeps())
    entries = await read_stream(client)
    assert [entry.type for entry in entries[-2:]] == ["error", "end"]
    return entries[-2].body


async def test_listeners_get_a_sentence_and_the_log_gets_the_exception(
    configured: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    body = await fail(configured)
    assert body["error_type"] == "ConnectionError"
    assert body["code"] == "run_failed"
    assert body["msg"] == "The run failed because of an internal error."
    entries = await read_stream(configured)
    assert "secret" not in "".join(str(entry.body) for entry in entries)
    assert "secret" not in str(await read_facts(configured))
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert record.name == "agx"
    run_id = entries[0].body["run_id"]
    fields = {"run_id": run_id, "session": "1/1/s", "agent": "helper", "tool": "look_up"}
    assert {name: getattr(record, name) for name in fields} == fields
    assert all(value in record.getMessage() for value in fields.values())
    assert SECRET in str(record.exc_info)
    assert "def look_up" not in record.getMessage()


async def test_describe_error_says_more_and_may_fail(configured: Redis) -> None:
    assert (await fail(configured, lambda error: f"Sorry: {type(error).__name__}"))["msg"] == "Sorry: ConnectionError"
    default = "The run failed because of an internal error."
    assert (await fail(configured, lambda error: ""))["msg"] == default

    def broken(error: BaseException) -> str:
        raise RuntimeError(SECRET)

    def cancels(error: BaseException) -> str:
        raise asyncio.CancelledError

    for describe in (broken, cancels):
        body = await fail(configured, describe)
        assert body["msg"] == default
        assert body["error_type"] == "ConnectionError"


async def test_a_failed_model_is_not_blamed_on_a_tool(configured: Redis, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="broke"):
        await agx.run(FakeSession(), ScriptedAgent(model_error=ValueError("broke")).agent(), "Hi", ScopeDeps())
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert record.tool is None  # type: ignore[attr-defined] # a field of our own


async def test_a_cancelled_run_is_no_error(configured: Redis, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(agx.AgxCanceledError):
        await agx.run(FakeSession(), ScriptedAgent(call_tool=True, cancel_in_tool=True).agent(), "Hi", ScopeDeps())
    body = (await read_stream(configured))[-2].body
    assert (body["msg"], body["code"]) == ("canceled", "run_canceled")
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


async def test_a_store_that_refuses_is_logged_once_and_without_the_conversation(
    configured: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    try:
        store = SqlSessions(engine)
        await store.create_table()
        session = store.open(1, 1, "s")
        async with engine.begin() as connection:
            await connection.exec_driver_sql(
                "create trigger refuse before update on agx_sessions begin select no_such_disk(); end"
            )
        with pytest.raises(agx.SessionSaveError):
            await agx.run(session, ScriptedAgent().agent(), "my secret", ScopeDeps())
    finally:
        await engine.dispose()
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    text = logging.Formatter().format(record)
    assert "no_such_disk" in text
    assert "Traceback" in text
    assert "my secret" not in text
    body = (await read_stream(configured))[-2].body
    assert body["code"] == "session_not_saved"


@pytest.mark.parametrize("raised", [RuntimeError, asyncio.CancelledError])
def test_the_text_of_an_exception_is_read_whatever_it_raises(raised: type[BaseException]) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise raised

    assert describe_text(Mute()) == "(Mute, whose text can't be read)"
