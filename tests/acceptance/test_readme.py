"""The README runs as it stands there, but for the model and the addresses."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import httpx
import orjson
import pytest
from support.docs import Blocks, every_block
from support.shell import PATH, run_block, serve
from support.waiting import wait_until_sync

from agx.child import Child, draw_ports

REDIS = "redis://localhost:6379"


def test_every_block(redis_url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with every_block("README.md") as page:
        the_two_commands_come_first(page)
        twenty_lines(page, redis_url, capsys)
        the_sidecar(page, redis_url, tmp_path)


def the_two_commands_come_first(page: Blocks) -> None:
    first = page.left[0].code
    assert re.findall(r"^make \w+", first, re.MULTILINE) == ["make demo", "make test"]
    # What they would run; test_demo.py runs the first of it, and the second is this run.
    said = run_block(page.take("bash"))
    assert re.search(r"^\S+/agx demo$", said, re.MULTILINE)
    assert re.search(r"^\S+/python -m pytest ", said, re.MULTILINE)


def twenty_lines(page: Blocks, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = page.take("python")
    assert "openai:gpt-4o-mini" in code
    assert REDIS in code
    code = code.replace("openai:gpt-4o-mini", "test").replace(REDIS, redis_url)
    namespace: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    asyncio.run(namespace["main"]())  # type: ignore[operator]
    *events, answer = capsys.readouterr().out.splitlines()
    types = [orjson.loads(event)["type"] for event in events]
    assert (types[0], types[-1]) == ("begin", "end")
    assert answer == "success (no tool calls)"


def the_sidecar(page: Blocks, redis_url: str, tmp_path: Path) -> None:
    *installs, line = page.take("bash").splitlines()
    run_block("\n".join(installs))
    command, _, promised = line.partition("#")
    assert REDIS in command
    (port,) = draw_ports(1)
    url = promised.strip().replace("9464", str(port))
    environment = {**os.environ, "PATH": PATH, "AGX_HTTP_PORT": str(port)}
    serving = serve(command.replace(REDIS, redis_url))
    sidecar = Child(serving, log=tmp_path / "log", home=tmp_path / "nothing", environment=environment)
    try:
        wait_until_sync(lambda: "agx_sidecar_leader 1" in read_page(url, sidecar), what="the sidecar counts")
    finally:
        assert sidecar.end() == 0, (tmp_path / "log").read_text()


def read_page(url: str, sidecar: Child) -> str:
    if sidecar.ended:
        raise RuntimeError("the sidecar ended")
    try:
        return httpx.get(url, trust_env=False).text
    except httpx.TransportError:
        return ""
