"""The layout is what docs/design.md says: every file stands in its table, has one job, and says it first."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "agx", ROOT / "sidecar" / "agx_sidecar")
FILES = sorted(file for package in PACKAGES for file in package.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_says_its_job_and_stays_small(file: Path) -> None:
    source = file.read_text()
    tree = ast.parse(source)
    if source:
        assert (ast.get_docstring(tree) or "").strip()
    assert source.count("\n") <= MOST_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A router's factory is as long as its routes, each of which is a function of its own.
            own = _lines(node) - sum(_lines(inner) for inner in node.body if isinstance(inner, ast.AsyncFunctionDef))
            assert own <= MOST_LINES_OF_A_FUNCTION, f"{node.name}: {own} lines"


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_the_table_names_every_file() -> None:
    table = (ROOT / "docs" / "design.md").read_text()
    tops = {(file if file.parent in PACKAGES else file.parent) for file in FILES}
    names = {f"{top.name}/" if top.is_dir() else top.stem for top in tops}
    assert not [name for name in names if not name.startswith("__") and f"`{name}`" not in table]


TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_tests_share_code_only_in_support(file: Path) -> None:
    """A test imports no sibling module: two folders may then have modules of one name, and run in one call."""
    siblings = {other.stem for other in file.parent.glob("*.py")} if file.name.startswith("test_") else {"conftest"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            assert node.module.partition(".")[0] not in siblings, f"import {node.module} from tests/support instead"
            if node.module.startswith("support."):
                shared = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(shared, name.name)]
                assert not missing, f"{node.module} has no {missing}"
