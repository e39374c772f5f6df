"""docs/how-to/sub-agents.md: its agents, its listener and its function for pages."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from support.agents import call, scripted
from support.docs import every_block

import agx

pytestmark = pytest.mark.npm

SHOW = """
import { apply } from "./agx.js";
import { describe } from "./page.js";
const events = JSON.parse(process.argv[2]);
const parts = events.reduce(apply, []);
console.log(JSON.stringify(parts.flatMap((part) => describe(part))));
"""


def show(home: Path, events: list[dict[str, Any]]) -> list[str]:
    """Return the lines that a page shows after these events."""
    command = ["node", "show.js", json.dumps(events)]
    lines: list[str] = json.loads(subprocess.run(command, cwd=home, capture_output=True, text=True, check=True).stdout)
    return lines


async def test_every_block(configured: Redis, tmp_path: Path) -> None:
    page: dict[str, Any] = {}
    with every_block("docs/how-to/sub-agents.md") as blocks:
        exec(blocks.take("python"), page)
        exec(blocks.take("python"), page)
        (tmp_path / "page.js").write_text(blocks.take("js"))
    asking = call("explore", '{"places": ["attic", "cellar"]}')
    with (
        page["planner"].override(model=scripted(asking, ["Found."])),
        page["scout"].override(model=scripted(["Not ", "here"], ["It is ", "here"])),
    ):
        session = agx.RedisSession("acme", "ada", "s")
        await agx.run(session, page["planner"], "Where is it?", page["ChatDeps"](user_id="ada", session_id="s"))
    texts = await page["read_texts"]("s")
    assert texts.pop("") == "Found."
    assert sorted(texts.values()) == ["It is here", "Not here"]

    events = [event async for event in agx.listen("acme", "ada", "s", serialize=False)]
    shutil.copy(str(files("agx.client") / "agx.js"), tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "show.js").write_text(SHOW)
    assert sorted(show(tmp_path, events)) == ["scout: It is here", "scout: Not here"]
    until = next(n for n, event in enumerate(events) if event["body"].get("event") == "run-end")
    unfinished = show(tmp_path, events[:until])
    assert len(unfinished) == 2
    assert all(line.startswith("scout: ") and line.endswith("…") for line in unfinished)
