"""The contributor's page names files that exist, and all that import pydantic-ai."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contributing.md").read_text()


def named(text: str) -> set[Path]:
    return {ROOT / name for name in re.findall(r"`((?:agx|sidecar|tests|docs|\.ci)/[\w./]*)`", text)}


def test_every_named_file_exists() -> None:
    assert named(PAGE)
    assert [path for path in named(PAGE) if not path.exists()] == []


def test_every_importer_of_pydantic_ai_is_named() -> None:
    listed = named(PAGE.partition("## What depends on pydantic-ai")[2])
    assert ROOT / "agx" not in listed  # it would name every file
    for package in ("agx", "opale", "sidecar/agx_sidecar"):
        for file in (ROOT / package).rglob("*.py"):
            if re.search(r"^\s*(from|import) pydantic_ai\b", file.read_text(), re.MULTILINE):
                assert listed & {file, *file.parents}, f"docs/contributing.md does not name {file.relative_to(ROOT)}"
