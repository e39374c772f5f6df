"""`agx worker` as operators and developers run it: real processes, probes, a hand-over at SIGTERM, a reload."""

from __future__ import annotations

import asyncio
import os
import re
import sysconfig
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from redis.asyncio import Redis
from support.waiting import wait_until

import agx
from agx import cli
from agx.cli.worker import find_worker

AGX = Path(sysconfig.get_path("scripts")) / "agx"

# A user's module: the tool waits until the file `may_end` exists; then the model answers.
MODULE = """
import asyncio
from dataclasses import dataclass
from pathlib import Path

from pydantic_ai import Agent
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.function import DeltaToolCall, FunctionModel

import agx


@dataclass(kw_only=True)
class ShopDeps(agx.Deps):
    tenant: str

    def get_scope_id(self):
        return self.tenant


async def answer(messages, info):
    if any(isinstance(message, ModelResponse) for message in messages):
        yield "Hello"
    else:
        yield {0: DeltaToolCall("look", "{}", tool_call_id="look")}


agent = Agent(FunctionModel(stream_function=answer), name="support", deps_type=ShopDeps)


@agent.tool_plain
async def look() -> str:
    with Path("looks").open("a") as looks:
        looks.write("look\\n")
    while not Path("may_end").exists():
        await asyncio.sleep(0.01)
    return "looked"


async def make_support(job):
    deps = ShopDeps(tenant=job.scope_id, user_id=job.user_id, session_id=job.session_id)
    return agx.Call(agx.RedisSession(job.scope_id, job.user_id, job.session_id), agent, deps)


worker = agx.Worker({"support": make_support})
number = 1
"""


class Command:
    """A running `agx worker` and its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    async def wait_for(self, pattern: str, count: int = 1) -> str:
        """Return what the pattern matches, the count-th time."""
        text = await wait_until(
            lambda: list(re.finditer(pattern, self._log.read_text()))[count - 1 : count],
            what=f"{pattern}: {self._log.read_text()}",
        )
        return text[0][0]

    async def get(self, path: str) -> tuple[int, str]:
        """Ask a probe."""
        place = (await self.wait_for(r"http://[\d.:]+/")).rstrip("/")

        def ask() -> tuple[int, str]:
            try:
                with urlopen(place + path) as response:
                    return response.status, response.read().decode()
            except HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(ask)


@asynccontextmanager
async def started(home: Path, redis_url: str, *args: str) -> AsyncIterator[Command]:
    log = home / f"{uuid.uuid4().hex}.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AGX_")}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            AGX, "worker", "shop:worker", *args, cwd=home, stdout=output, stderr=output,
            env={**inherited, "AGX_REDIS_URL": redis_url},
        )  # fmt: skip
    try:
        yield Command(process, log)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 60)
        process._transport.close()  # type: ignore[attr-defined] # it outlives the process otherwise
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A directory with the user's module."""
    (tmp_path / "shop.py").write_text(MODULE)
    return tmp_path


async def follow(session: str) -> list[dict[str, Any]]:
    return [event async for event in agx.listen("acme", "ada", session, serialize=False, wait=60, timeout=60)]


async def test_sigterm_hands_a_run_over_to_another_worker(configured: Redis, redis_url: str, shop: Path) -> None:
    async with started(shop, redis_url, "--at-once", "3", "--health", "127.0.0.1:0") as first:
        await agx.submit("acme", "ada", "s", agent="support", prompt="Hi")
        await wait_until((shop / "looks").exists)
        assert await first.get("/healthz") == (200, "ok\n")
        assert await first.get("/readyz") == (200, "ok, 1 of 3 runs\n")
        async with started(shop, redis_url) as second:
            await second.wait_for("serves support, 20 runs at once")
            first.process.terminate()
            await wait_until(lambda: _is_not_ready(first))
            (shop / "may_end").touch()
            events = await follow("s")
            assert await asyncio.wait_for(first.process.wait(), 60) == 0
            assert [event["body"]["void"] for event in events if event["type"] == "resume"] == [None]
            assert events[-1]["body"]["outcome"] == "completed"
            assert (shop / "looks").read_text() == "look\n"


async def _is_not_ready(command: Command) -> bool:
    return await command.get("/readyz") == (503, "takes no jobs: it is stopping, or Redis does not answer\n")


async def test_a_changed_file_restarts_the_worker(configured: Redis, redis_url: str, shop: Path) -> None:
    (shop / "may_end").touch()
    async with started(shop, redis_url, "--reload") as command:
        await command.wait_for("serves support")
        (shop / "shop.py").write_text(MODULE.replace('"Hello"', '"Good morning"'))
        await command.wait_for("serves support", 2)
        await agx.submit("acme", "ada", "s", agent="support", prompt="Hi")
        assert "Good morning" in str(await follow("s"))
        command.process.terminate()
        assert await asyncio.wait_for(command.process.wait(), 60) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["shop"], "'shop' names no worker: write MODULE:WORKER"),
        (["nowhere:worker"], "there is no module 'nowhere'"),
        (["shop:nothing"], "module 'shop' has no 'nothing'"),
        (["shop:number"], "shop:number is not an agx.Worker but a int"),
        (["shop:worker", "--at-once", "0"], "--at-once must be at least 1"),
        (["shop:worker", "--health", "8081"], "--health must be HOST:PORT"),
        (["shop:worker", "--health", "127.0.0.1:99999"], "--health must be HOST:PORT"),
        (["shop:worker", "--health", "192.0.2.1:8081"], "--health can't listen on 192.0.2.1:8081"),
    ],
)
async def test_what_is_refused(
    configured: Redis,
    shop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.syspath_prepend(str(shop))
    assert await asyncio.to_thread(cli.main, ["worker", *args]) == 1
    assert message in capsys.readouterr().err


def test_a_module_that_imports_a_missing_one_is_not_called_missing(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "broken.py").write_text("import absent_package")
    monkeypatch.syspath_prepend(str(shop))
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        find_worker("broken:worker")
