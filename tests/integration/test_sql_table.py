"""The table of `SqlSessions`: made once by processes that come together, and migrated from the one of agx 0.2."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy
from pydantic_ai.messages import ModelMessagesTypeAdapter, ModelRequest, UserPromptPart
from sqlalchemy.ext.asyncio import create_async_engine
from support.postgres import running_postgres

from agx.sessions.sql_session import SqlSessions

NEW, OLD = [f"new_{n}" for n in range(8)], [f"old_{n}" for n in range(8)]  # a race shows in some of them
OLD_TABLE = """
CREATE TABLE {name} (
    scope_id VARCHAR(200) NOT NULL, user_id VARCHAR(200) NOT NULL, session_id VARCHAR(200) NOT NULL,
    version INTEGER NOT NULL, title VARCHAR(200) NOT NULL, saved_us BIGINT NOT NULL, messages TEXT NOT NULL,
    PRIMARY KEY (scope_id, user_id, session_id)
)
"""
CREATE = """
import asyncio, sys
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine
from agx.sessions.sql_session import SqlSessions, make_table

async def main() -> None:
    engine = create_async_engine(sys.argv[1])
    stores = [SqlSessions(engine, make_table(sqlalchemy.MetaData(), name)) for name in sys.argv[2:]]
    async with engine.connect():
        print("ready", flush=True)
        sys.stdin.readline()
    for store in stores:
        await store.create_table()
        await store.list(1, 1)
    await engine.dispose()

asyncio.run(main())
"""


@asynccontextmanager
async def old_tables(url: str, *names: str) -> AsyncIterator[SqlSessions]:
    """Give a store over the tables of agx 0.2, the first of which has a conversation."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        for name in names:
            await connection.execute(sqlalchemy.text(OLD_TABLE.format(name=name)))
        messages = ModelMessagesTypeAdapter.dump_json([ModelRequest(parts=[UserPromptPart("Hi there")])])
        insert = f"INSERT INTO {names[0]} VALUES ('1', '1', 'old', 1, 'Hi there', 1000000, :messages)"
        await connection.execute(sqlalchemy.text(insert), {"messages": messages.decode()})
    yield SqlSessions(engine)
    await engine.dispose()


async def check_migration(url: str) -> None:
    """A table of agx 0.2 is migrated once, and its conversation goes on."""
    async with old_tables(url, "agx_sessions") as store:
        await store.create_table()
        await store.create_table()
        (listed,) = await store.list(1, 1, search="THERE")
        assert (listed.session_id, listed.title, listed.parent) == ("old", "Hi there", None)
        await store.rename(1, 1, "old", "Renamed")
        session = store.open(1, 1, "old")
        await session.load()
        session.msgs = [*session.msgs, ModelRequest(parts=[UserPromptPart("again")])]
        await session.save()
        assert [one.title for one in await store.list(1, 1, search="again")] == ["Renamed"]
        assert await store.list(1, 1, search="user-prompt") == []


async def test_a_table_of_the_last_release_is_migrated(tmp_path: Path) -> None:
    await check_migration(f"sqlite+aiosqlite:///{tmp_path / 'chats.sqlite'}")


@pytest.mark.postgres
def test_two_processes_create_and_migrate_tables_at_the_same_time() -> None:
    with running_postgres() as url:
        asyncio.run(check_migration(url))
        asyncio.run(make_old_tables(url))
        command = [sys.executable, "-c", CREATE, url, *NEW, *OLD]
        with _start(command) as first, _start(command) as second:
            for process in (first, second):
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in (first, second):
                assert process.stdin is not None
                process.stdin.close()
        assert (first.returncode, second.returncode) == (0, 0)


async def make_old_tables(url: str) -> None:
    async with old_tables(url, *OLD):
        pass


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
