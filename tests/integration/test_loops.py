"""Connections belong to a loop: closed with it without warnings, made anew by the next, never carried over a fork."""

from __future__ import annotations

import ast
import asyncio
import gc
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent

import agx


async def _run(session: str = "s") -> str:
    result = await agx.run(FakeSession(), ScriptedAgent().agent(), "Hello", deps=ScopeDeps(session_id=session))
    return result.output


def test_a_loop_that_ends_closes_its_connections(redis_url: str) -> None:
    agx.configure(agx.Config(redis=Redis.from_url(redis_url)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert asyncio.run(_run()) == "one two three"
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_a_loop_that_only_listened_or_asked_closes_its_connections(redis_url: str) -> None:
    agx.configure(agx.Config(redis=Redis.from_url(redis_url)))

    async def look() -> None:
        assert [event async for event in agx.listen(1, 1, "none", wait=0.1)] == []
        assert not await agx.cancel(1, 1, "none")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            asyncio.run(look())
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_two_loops_at_once(redis_url: str) -> None:
    agx.configure(agx.Config(redis=Redis.from_url(redis_url)))
    outputs: list[str] = []
    threads = [threading.Thread(target=lambda n=n: outputs.append(asyncio.run(_run(f"s{n}")))) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == ["one two three"] * 2


def test_a_fork_makes_its_own_connections(redis_url: str) -> None:
    agx.configure(agx.Config(redis=Redis.from_url(redis_url)))

    async def fork_in_the_middle() -> int:
        await _run("parent")
        child = os.fork()
        if child == 0:
            # The child leaves the parent's loop alone and starts one of its own.
            code = 1
            try:
                asyncio._set_running_loop(None)
                code = 0 if asyncio.run(_run("child")) == "one two three" else 2
            finally:
                os._exit(code)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        # What the child closed must not be what the parent uses.
        assert await _run("parent") == "one two three"
        await agx.aclose()
        return os.waitstatus_to_exitcode(status)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which pytest has
        assert asyncio.run(fork_in_the_middle()) == 0


def test_agx_imports_no_sidecar_and_no_sdk() -> None:
    # Read from the source: redis-py and pydantic-ai import an SDK by themselves where one is installed.
    heavy = ("agx_sidecar", "prometheus_client", "opentelemetry.sdk")
    package = Path(agx.__file__).parent
    for file in package.rglob("*.py"):
        if file.is_relative_to(package / "demo"):
            continue  # a program of its own, which reads what the sidecar exports
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(heavy)], file


def test_importing_agx_needs_no_extra() -> None:
    script = (
        "import sys, agx; print([name for name in ('agx_sidecar', 'fastapi', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["run", "listen", "Config", "Deps", "Session", "AgxCanceledError", "configure"])
def test_the_older_name_is_the_same_module(name: str) -> None:
    import opale.agx

    assert opale.agx is agx
    assert getattr(opale.agx, name) is getattr(agx, name)
