"""docs/how-to/migrate.md: its two services, on the real `pydantic-ai-stream` 0.1.1 and on agx, side by side."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pydantic_ai_stream as peer
import pytest
from redis.asyncio import Redis
from support.docs import Blocks, every_block
from support.model_server import Finish, ModelServer, Silence, Text, say
from support.terminals import Terminals
from support.waiting import wait_until

import agx

PAGE = "docs/how-to/migrate.md"
# What the page's files are known by.
MODULES = {"before": "from pydantic_ai_stream", "after": 'key_prefix="pyaix"', "both": "import before"}


def load(name: str, blocks: Blocks) -> ModuleType:
    """Import one of the page's files."""
    Path(f"{name}.py").write_text(blocks.take("python", MODULES[name]))
    importlib.invalidate_caches()
    return importlib.import_module(name)


@pytest.fixture
async def client(
    redis_url: str, model_server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Redis]:
    """A directory from which the page's files can be imported; a client of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in {"REDIS_URL": redis_url, **model_server.environment}.items():
        monkeypatch.setenv(name, value)
    async with Redis.from_url(redis_url) as client:
        yield client
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
async def before(client: Redis) -> AsyncIterator[ModuleType]:
    module = load("before", Blocks(PAGE))
    yield module
    await module.redis.aclose()


@pytest.fixture
async def after(client: Redis) -> AsyncIterator[ModuleType]:
    module = load("after", Blocks(PAGE))
    yield module
    await agx.aclose()
    await module.redis.aclose()


@pytest.mark.redis7
async def test_every_block(
    client: Redis, model_server: ModelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with every_block("docs/how-to/migrate.md") as page, Terminals(tmp_path) as terminals:
        terminals.run(page.take("bash", "pip install"))
        assert "pydantic-ai-stream" in terminals.run("pip list")
        await only_keys_of_dead_processes_are_removed(page.take("bash", "redis-cli"), client, terminals)
        await the_script_follows_and_stops([load(name, page) for name in MODULES][-1], model_server, capsys)


async def only_keys_of_dead_processes_are_removed(block: str, client: Redis, terminals: Terminals) -> None:
    await client.set("pyaix:1:7:dead:live", "1")
    await client.set("pyaix:1:7:alive:live", "run", ex=60)
    terminals.run(block.replace("redis-cli", f"redis-cli -p {client.get_connection_kwargs()['port']}"))
    assert await client.keys("*") == [b"pyaix:1:7:alive:live"]


async def the_script_follows_and_stops(
    script: ModuleType, model_server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    model_server.script((Text("half"), Silence(), Finish()))
    running = asyncio.create_task(script.main())
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return "told to stop: True" in said

    await wait_until(is_told)
    # The old package looks at its next node.
    model_server.release()
    await running
    assert "'msg': 'canceled'" in said + capsys.readouterr().out


async def test_a_conversation_goes_on_where_the_other_left_it(
    before: ModuleType, after: ModuleType, model_server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    model_server.script(say("Hello from the old"), say("Hello from the new"))
    await asyncio.gather(before.ask("chat-1", "Hi"), before.follow("chat-1"))
    assert "Hello" in capsys.readouterr().out
    await asyncio.gather(after.ask("chat-1", "And now?"), after.follow("chat-1"))
    said = capsys.readouterr().out
    assert "'outcome': 'completed'" in said
    asked = [message["content"] for message in model_server.requests[1].body["messages"]]
    assert asked == ["Hi", "Hello from the old", "And now?"]


async def test_agx_follows_and_stops_a_run_of_the_other(
    before: ModuleType, after: ModuleType, model_server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    model_server.script((Text("half"), Silence(), Finish()))
    running = asyncio.create_task(before.ask("chat-1", "Hello"))
    await wait_until(lambda: model_server.silent)
    following = asyncio.create_task(after.follow("chat-1"))
    assert [session async for *_, session in agx.q(1, 7)] == []
    with pytest.raises(agx.SessionBusyError):
        await after.ask("chat-1", "Hello")
    assert await after.stop("chat-1")
    # It looks at its next node.
    model_server.release()
    await asyncio.gather(running, following)
    said = capsys.readouterr().out
    assert "'msg': 'canceled'" in said
    assert "stopped" in said


async def test_the_other_follows_finds_and_stops_a_run_of_agx(
    before: ModuleType, after: ModuleType, model_server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    model_server.script((Text("half"), Silence()))
    running = asyncio.create_task(after.ask("chat-1", "Hello"))
    await wait_until(lambda: model_server.silent)
    following = asyncio.create_task(before.follow("chat-1"))
    assert [session async for *_, session in peer.q(before.redis, 1, 7)] == ["chat-1"]
    assert await before.MyDeps(redis=before.redis, user_id=7, session_id="chat-1").is_live()
    assert await before.stop("chat-1")
    await asyncio.gather(running, following)
    said = capsys.readouterr().out
    assert "half" in said
    assert "stopped" in said
    # What it had said is saved.
    session = after.MySession(path=Path("chat-1.json"))
    await session.load()
    assert "half" in repr(session.msgs)
    events = [event async for event in agx.listen(1, 7, "chat-1", serialize=False)]
    assert events[-1]["body"]["reason"] == "lease_deleted"


async def test_a_run_of_the_other_takes_a_session_from_agx(
    before: ModuleType, after: ModuleType, model_server: ModelServer
) -> None:
    model_server.script((Text("half"), Silence()), say("Mine."))
    running = asyncio.create_task(after.ask("chat-1", "Hello"))
    await wait_until(lambda: model_server.silent)
    await before.ask("chat-1", "Hello")
    with pytest.raises(agx.LeaseLostError):
        await running
