"""The README's twenty lines run as they stand there, but for the model and the address of Redis."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import orjson
import pytest

README = Path(__file__).parents[2] / "README.md"


def test_twenty_lines(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert "openai:gpt-4o-mini" in code
    assert "redis://localhost:6379" in code
    code = code.replace("openai:gpt-4o-mini", "test").replace("redis://localhost:6379", redis_url)
    namespace: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    asyncio.run(namespace["main"]())  # type: ignore[operator]
    *events, answer = capsys.readouterr().out.splitlines()
    types = [orjson.loads(event)["type"] for event in events]
    assert (types[0], types[-1]) == ("begin", "end")
    assert answer == "success (no tool calls)"


def test_the_two_commands_come_first() -> None:
    first = README.read_text().split("```")[1]
    assert re.findall(r"^make \w+", first, re.MULTILINE) == ["make demo", "make test"]
