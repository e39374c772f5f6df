"""Every code block of the pages that are followed word for word is run by a test, whatever its language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docs import DOCS, ROOT, every_block, read_blocks

TESTS = ROOT / "tests"
FOLLOWED = {ROOT / "README.md", *DOCS.glob("tutorial.md"), *DOCS.glob("how-to/*.md")}


def pages_read(source: str) -> Iterator[str]:
    """Yield the pages whose blocks a test takes all."""
    yield from re.findall(r'with every_block\("([^"]+)"\) as', source)


def test_every_page_has_a_test_that_runs_it() -> None:
    read = {page for path in TESTS.rglob("test_*.py") for page in pages_read(path.read_text())}
    assert {str(page.relative_to(ROOT)) for page in FOLLOWED} - read == set(), (
        "no test takes every_block() of these pages"
    )


PAGE = """
```python
print(1)
```

1. In a list, and no language:

   ~~~
   plain
   ~~~

> ```yaml title="values.yaml"
> a: 1
> ```

Indented:

    make demo
"""


def test_blocks_are_found_however_they_are_set_off(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    found = [(block.language, block.code) for block in read_blocks(tmp_path / "page.md")]
    assert found == [("python", "print(1)\n"), ("", "plain\n"), ("yaml", "a: 1\n"), ("", "make demo\n")]


def test_a_block_that_is_not_taken_fails_the_test_that_reads_the_page() -> None:
    # Not named where it is called, or this would be taken for the test that runs the page.
    readme = "README.md"
    with pytest.raises(AssertionError, match="blocks that no test runs"), every_block(readme) as page:
        page.take("python")
    with pytest.raises(AssertionError, match="no further rust block"), every_block(readme) as page:
        page.take("rust")
