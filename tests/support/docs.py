"""The code blocks of the documentation, which are what tests run: a page can't say anything that does not work."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks in a language, in their order."""
    return [block for kind, block in _BLOCK.findall((DOCS / page).read_text()) if kind == language]
