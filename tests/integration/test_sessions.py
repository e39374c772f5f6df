"""One contract for every store of sessions: what was saved is loaded, nobody's turn is overwritten, users are apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy
from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, ToolCallPart, UserPromptPart
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine
from support.agents import ScopeDeps, ScriptedAgent
from support.postgres import running_postgres
from support.proxy import Proxy
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.errors import SessionConflictError
from agx.sessions.base import Session, SessionStore
from agx.sessions.redis_session import RedisSessions
from agx.sessions.sql_session import SqlSessions, make_table


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(
    params=["redis", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)],
)
async def store(request: pytest.FixtureRequest, configured: Redis, tmp_path: Path) -> AsyncIterator[SessionStore]:
    if request.param == "redis":
        yield RedisSessions(ttl=60)
        return
    url = f"sqlite+aiosqlite:///{tmp_path / 'chats.sqlite'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    async with sql_sessions(url) as sessions:
        yield sessions


@asynccontextmanager
async def sql_sessions(url: str) -> AsyncIterator[SqlSessions]:
    """Give a store whose table is dropped afterwards."""
    engine = create_async_engine(url)
    store = SqlSessions(engine)
    await store.create_table()
    await store.create_table()  # it is there already
    try:
        yield store
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(store.table.metadata.drop_all)
        await engine.dispose()


async def say(store: SessionStore, text: str, *, session: str = "s", user: int = 1, scope: int = 1) -> Session:
    """Load a conversation, add a turn, save it."""
    opened = store.open(scope, user, session)
    await opened.load()
    opened.msgs = [
        *opened.msgs,
        ModelRequest(parts=[UserPromptPart(text)]),
        ModelResponse(parts=[TextPart(f"heard {text}")]),
    ]
    await opened.save()
    return opened


async def read(store: SessionStore, session: str = "s", user: int = 1, scope: int = 1) -> list[str]:
    """Return a conversation as texts."""
    opened = store.open(scope, user, session)
    await opened.load()
    return [str(part.content) for message in opened.msgs for part in message.parts if hasattr(part, "content")]


async def test_what_was_saved_is_loaded(store: SessionStore) -> None:
    assert await read(store) == []
    await say(store, "one")
    await say(store, "two ✓ \0 \U0001f600")
    assert await read(store) == ["one", "heard one", "two ✓ \0 \U0001f600", "heard two ✓ \0 \U0001f600"]


async def test_a_session_saves_again_and_again(store: SessionStore) -> None:
    session = await say(store, "one")
    session.msgs = [*session.msgs, ModelRequest(parts=[UserPromptPart("more")])]
    await session.save()
    assert (await read(store))[-1] == "more"


async def test_an_update_is_never_lost(store: SessionStore) -> None:
    await say(store, "one")
    late = store.open(1, 1, "s")
    await late.load()
    await say(store, "two")
    late.msgs = [*late.msgs, ModelRequest(parts=[UserPromptPart("late")])]
    with pytest.raises(SessionConflictError, match="load it again"):
        await late.save()
    assert "late" not in await read(store)
    await late.load()
    assert len(late.msgs) == 4
    late.msgs = [*late.msgs, ModelRequest(parts=[UserPromptPart("late")])]
    await late.save()
    assert (await read(store))[-1] == "late"


async def test_of_two_first_turns_one_wins(store: SessionStore) -> None:
    first, second = store.open(1, 1, "s"), store.open(1, 1, "s")
    await first.load()
    await second.load()
    first.msgs = [ModelRequest(parts=[UserPromptPart("first")])]
    second.msgs = [ModelRequest(parts=[UserPromptPart("second")])]
    await first.save()
    with pytest.raises(SessionConflictError):
        await second.save()
    assert await read(store) == ["first"]


async def test_users_and_scopes_are_apart(store: SessionStore) -> None:
    await say(store, "mine", user=1)
    await say(store, "theirs", user=2)
    await say(store, "elsewhere", scope=2)
    assert await read(store, user=1) == ["mine", "heard mine"]
    assert await read(store, user=2) == ["theirs", "heard theirs"]
    assert [one.title for one in await store.list(1, 1)] == ["mine"]
    assert [one.title for one in await store.list(2, 1)] == ["elsewhere"]
    assert await store.list(3, 1) == []


async def test_a_listing_has_the_last_saved_first_and_pages(store: SessionStore) -> None:
    for name in ("a", "b", "c"):
        await say(store, f"title of {name} \0\ud800" if name == "b" else f"title of {name}", session=name)
    await say(store, "again", session="a")
    found = await store.list(1, 1)
    assert [(one.session_id, one.title) for one in found] == [
        ("a", "title of a"),
        ("c", "title of c"),
        ("b", "title of b ?"),
    ]
    assert found[0].saved_at >= found[1].saved_at >= found[2].saved_at
    assert [one.session_id for one in await store.list(1, 1, limit=1, offset=1)] == ["c"]


async def test_a_title_stays_through_later_turns(store: SessionStore) -> None:
    await say(store, "one")
    await store.rename(1, 1, "s", "  Trip to Oslo ✓ ")
    await say(store, "two")
    assert [one.title for one in await store.list(1, 1)] == ["Trip to Oslo ✓"]
    for title in ("", " ", "\0", "t" * 201):
        with pytest.raises(agx.TextError):
            await store.rename(1, 1, "s", title)
    with pytest.raises(TypeError):
        await store.rename(1, 1, "s", 1)  # type: ignore[arg-type] # what is tested
    for scope, user, session in ((2, 1, "s"), (1, 2, "s"), (1, 1, "t")):
        with pytest.raises(agx.SessionUnknownError):
            await store.rename(scope, user, session, "mine")
    assert await read(store, "t") == []


async def test_a_search_finds_titles_and_where_the_store_can_texts(store: SessionStore) -> None:
    await say(store, "Où est le 100% Café?", session="a")
    await say(store, "Where is it?", session="b")
    await say(store, "Café", session="c", user=2)
    await say(store, "next\0 \ud800 question", session="b")
    await store.rename(1, 1, "b", "Renamed")

    async def found(search: str, **page: int) -> list[str]:
        return [one.session_id for one in await store.list(1, 1, search=search, **page)]

    assert await found("CAFÉ") == await found("100% c") == ["a"]
    assert await found("%") == ["a"]
    assert await found("_") == await found("user-prompt") == []
    assert await found("renAMED") == ["b"]
    assert await found("") == ["b", "a"]
    assert await found("e", limit=1, offset=1) == ["a"]
    assert await found("heard WHERE") == await found("next ") == (["b"] if isinstance(store, SqlSessions) else [])
    await store.rename(1, 1, "b", "Große ÄPFEL")
    assert await found("Große ÄPFEL") == await found("ße\0 Ä") == ["b"]


async def test_a_branch_goes_on_by_itself(store: SessionStore) -> None:
    await say(store, "one")
    await say(store, "two")
    name = await agx.branch_session(1, 1, "s", messages=2, sessions=store)
    await agx.branch_session(1, 1, "s", messages=1, sessions=store, branch_id="asked")
    await say(store, "other", session=name)
    assert await read(store, name) == ["one", "heard one", "other", "heard other"]
    assert await read(store, "asked") == ["one"]
    assert await read(store) == ["one", "heard one", "two", "heard two"]
    assert {one.session_id: one.parent for one in await store.list(1, 1)} == {name: "s", "asked": "s", "s": None}
    assert [one.session_id for one in await store.list(1, 1, parent="s")] == [name, "asked"]


async def test_what_cannot_be_branched_is_refused(store: SessionStore) -> None:
    session = await say(store, "one")
    session.msgs = [*session.msgs, ModelResponse(parts=[ToolCallPart("work", {})])]
    await session.save()

    async def branch(messages: int = 1, *, user: int = 1, session: str = "s", branch_id: str | None = None) -> None:
        await agx.branch_session(1, user, session, messages=messages, sessions=store, branch_id=branch_id)

    for messages in (0, -1, 3, 4):
        with pytest.raises(agx.BranchError):
            await branch(messages)
    for user, name in ((2, "s"), (1, "t")):
        with pytest.raises(agx.SessionUnknownError):
            await branch(user=user, session=name)
    with pytest.raises(SessionConflictError):
        await branch(branch_id="s")
    with pytest.raises(ValueError, match="branch_id"):
        await branch(branch_id="a:b")
    assert [one.session_id for one in await store.list(1, 1)] == ["s"]


async def test_a_deleted_conversation_is_gone_and_its_branches_stay(store: SessionStore) -> None:
    await say(store, "one")
    await agx.branch_session(1, 1, "s", messages=2, sessions=store, branch_id="branch")
    for scope, user in ((2, 1), (1, 2)):
        assert not await store.delete(scope, user, "s")
    assert await store.delete(1, 1, "s")
    assert not await store.delete(1, 1, "s")
    assert await read(store) == []
    assert [(one.session_id, one.parent) for one in await store.list(1, 1)] == [("branch", None)]
    assert await read(store, "branch") == ["one", "heard one"]
    await say(store, "anew")
    assert await read(store) == ["anew", "heard anew"]


@pytest.mark.parametrize("wrong", ["", "a:b", "a*", "a\n", None, True, 1.5])
async def test_wrong_ids_are_refused(store: SessionStore, wrong: object) -> None:
    opens: list[Callable[[], object]] = [
        lambda: store.open(wrong, 1, "s"),  # type: ignore[arg-type] # what is tested
        lambda: store.open(1, wrong, "s"),  # type: ignore[arg-type]
        lambda: store.open(1, 1, wrong),  # type: ignore[arg-type]
    ]
    for opening in opens:
        with pytest.raises((ValueError, TypeError)):
            opening()
    asks: list[Callable[[], Awaitable[object]]] = [
        lambda: store.list(1, wrong),  # type: ignore[arg-type]
        lambda: store.rename(1, 1, wrong, "title"),  # type: ignore[arg-type]
        lambda: store.delete(1, 1, wrong),  # type: ignore[arg-type]
    ]
    for ask in asks:
        with pytest.raises((ValueError, TypeError)):
            await ask()


async def test_runs_keep_their_conversation(store: SessionStore) -> None:
    agent = ScriptedAgent().agent()
    for prompt in ("first", "second"):
        await agx.run(store.open(1, 1, "s"), agent, prompt, ScopeDeps())
    assert await read(store) == ["first", "one two three", "second", "one two three"]


async def test_a_run_that_lost_its_conversation_to_another_says_so_and_keeps_its_answer(store: SessionStore) -> None:
    stage = ScriptedAgent()
    agent = stage.agent()

    @agent.instructions
    async def meanwhile() -> str:
        await say(store, "meanwhile")
        return ""

    with pytest.raises(agx.SessionSaveError) as caught:
        await agx.run(store.open(1, 1, "s"), agent, "mine", ScopeDeps())
    assert isinstance(caught.value.__cause__, SessionConflictError)
    assert caught.value.result is not None
    assert caught.value.result.output == "one two three"
    assert await read(store) == ["mine", "meanwhile", "heard meanwhile"]


@pytest.fixture
async def proxy(server: EmbeddedServer, redis_url: str) -> AsyncIterator[Proxy]:
    """agx, configured with a client on the worker's server, through a proxy that breaks."""
    async with Proxy(server.port) as proxy, Redis.from_url(proxy.url) as client:
        agx.configure(agx.Config(redis=client))
        yield proxy
        await agx.aclose()


async def test_a_redis_session_is_saved_once_although_the_reply_is_lost(proxy: Proxy) -> None:
    """The same save is sent again, and is no conflict with itself."""
    store = RedisSessions(ttl=60)
    session = await say(store, "one")
    session.msgs = [*session.msgs, ModelRequest(parts=[UserPromptPart("more")])]
    proxy.lose_replies(1)
    await session.save()
    assert (await read(store))[-1] == "more"
    await say(store, "two")
    assert (await read(store))[-2:] == ["two", "heard two"]


async def test_a_redis_session_is_saved_through_an_outage(proxy: Proxy) -> None:
    store = RedisSessions(ttl=60)
    session = await say(store, "one")
    session.msgs = [*session.msgs, ModelRequest(parts=[UserPromptPart("more")])]
    proxy.refuse()
    tried = proxy.connections
    saving = asyncio.create_task(session.save())
    await wait_until(lambda: proxy.connections > tried + 1)
    proxy.accept()
    await saving
    assert (await read(store))[-1] == "more"


async def test_a_redis_session_says_when_the_outage_is_too_long(proxy: Proxy) -> None:
    async with Redis.from_url(proxy.url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=0.3))
        session = RedisSessions(ttl=60).open(1, 1, "s")
        await session.load()
        proxy.refuse()
        with pytest.raises(agx.RedisUnavailableError, match="save the session"):
            await session.save()
        proxy.accept()
        await agx.aclose()


async def test_redis_sessions_expire_and_leave_the_listing(configured: Redis) -> None:
    store = RedisSessions(ttl=60)
    await say(store, "gone", session="gone")
    await say(store, "kept", session="kept")
    assert 0 < await configured.ttl("agx:1:1:gone:msgs") <= 60
    assert 0 < await configured.ttl("agx:1:1::saved") <= 60
    await configured.delete("agx:1:1:gone:msgs")
    assert [one.session_id for one in await store.list(1, 1)] == ["kept"]

    async def healed() -> bool:
        return await configured.zrange("agx:1:1::saved", 0, -1) == [b"kept"]

    await wait_until(healed)


async def test_a_table_may_be_declared_in_the_users_own_metadata(tmp_path: Path) -> None:
    metadata = sqlalchemy.MetaData()
    table = make_table(metadata, "conversations")
    assert metadata.tables["conversations"] is table
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.sqlite'}")
    store = SqlSessions(engine, table)
    await store.create_table()
    await say(store, "mine")
    assert await read(store) == ["mine", "heard mine"]
    await engine.dispose()
