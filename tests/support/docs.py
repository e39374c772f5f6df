"""The code blocks of the documentation, which tests run: what a page shows works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Block:
    """A code block, however its page sets it off; `language` is empty where none is named."""

    language: str
    code: str


class Blocks:
    """The blocks of a page (from the top of the repository) that no test has taken yet."""

    def __init__(self, page: str) -> None:
        self.page = page
        self.left = read_blocks(ROOT / page)

    def take(self, language: str, containing: str = "") -> str:
        """Return the next block in a language, or the next of them that contains a text; it is to be run."""
        for block in self.left:
            if block.language == language and containing in block.code:
                self.left.remove(block)
                return block.code
        raise AssertionError(f"{self.page} has no further {language} block with {containing!r}")


@contextmanager
def every_block(page: str) -> Iterator[Blocks]:
    """Give the blocks of a page to the one test that runs them all.

    It fails where the test leaves one; `tests/acceptance/test_docs.py` fails where a page has no such test.
    """
    blocks = Blocks(page)
    yield blocks
    assert not blocks.left, f"{page} has blocks that no test runs: {blocks.left}"


def read_blocks(path: Path) -> list[Block]:
    """Return all blocks of a page, fenced or indented, in lists and quotations too; diagrams are not to be run."""
    tokens = MarkdownIt().parse(path.read_text())
    return [
        Block(language=token.info.partition(" ")[0], code=token.content)
        for token in tokens
        if token.type in ("fence", "code_block") and token.info != "mermaid"
    ]
