"""The README runs as it stands there, but for the model and the addresses."""

from __future__ import annotations

import re
from pathlib import Path
from signal import SIGTERM

import httpx
import orjson
import pytest
from support.docs import ROOT, Blocks, every_block
from support.terminals import Terminals
from support.waiting import wait_until_sync

from agx.embedded.child import draw_ports

REDIS = "redis://localhost:6379"


def test_every_block(redis_url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with every_block("README.md") as page:
        the_two_commands_come_first(page)
        the_wheel(page, tmp_path)
        a_server(page, tmp_path)
        twenty_lines(page, redis_url, capsys)
        the_sidecar(page, redis_url, tmp_path)


def the_two_commands_come_first(page: Blocks) -> None:
    first = page.left[0].code
    assert re.findall(r"^make \w+", first, re.MULTILINE) == ["make demo", "make test"]
    # What they would run; test_demo.py runs the first of it, and the second is this run.
    with Terminals(ROOT) as terminals:
        said = terminals.run(page.take("bash"))
    assert re.search(r"^\S+/agx demo$", said, re.MULTILINE)
    assert re.search(r"^\S+/python -m pytest ", said, re.MULTILINE)


def a_server(page: Blocks, home: Path) -> None:
    *installs, line = page.take("bash").splitlines()
    with Terminals(home) as terminals:
        terminals.run("\n".join(installs))
        _, log = terminals.keep_running(line, "--port 0")
        wait_until_sync(lambda: re.match(r"redis://\S+", log.read_text()), what="the server")


def twenty_lines(page: Blocks, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They run as they are pasted; only the address is another."""
    code = page.take("python")
    assert code.count(REDIS) == 1
    capsys.readouterr()
    exec(compile(code.replace(REDIS, redis_url), "README.md", "exec"), {"__name__": "readme"})
    *events, answer = capsys.readouterr().out.splitlines()
    types = [orjson.loads(event)["type"] for event in events]
    assert (types[0], types[-1]) == ("begin", "end")
    assert answer == "success (no tool calls)"


def the_sidecar(page: Blocks, redis_url: str, home: Path) -> None:
    *installs, line = page.take("bash").splitlines()
    command, _, promised = line.partition("#")
    assert REDIS in command
    (port,) = draw_ports(1)
    url = promised.strip().replace("9464", str(port))
    with Terminals(home, {"AGX_HTTP_PORT": str(port)}) as terminals:
        terminals.run("\n".join(installs))
        sidecar, log = terminals.keep_running(command.replace(REDIS, redis_url), url=url)
        wait_until_sync(lambda: "agx_sidecar_leader 1" in httpx.get(url, trust_env=False).text, what="it counts")
        assert terminals.interrupt(sidecar, SIGTERM) == 0, log.read_text()


def the_wheel(page: Blocks, home: Path) -> None:
    """What pip looks for: `.ci/wheel` installs from such a directory."""
    build, use = page.take("bash").splitlines()
    assert build.startswith("pip wheel ")
    assert use == 'export PIP_FIND_LINKS="$PWD/dist"'
    assert build.endswith(" --wheel-dir dist .")
