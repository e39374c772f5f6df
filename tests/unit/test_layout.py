"""The layout is what docs/design.md says: small packages of small files, and each file states its one job."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "agx", ROOT / "opale", ROOT / "sidecar" / "agx_sidecar")
FILES = sorted(file for package in PACKAGES for file in package.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES, MAX_MODULES = 350, 60, 12


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _above_limits() -> Iterator[str]:
    for directory in sorted({file.parent for file in FILES}):
        if len([file for file in directory.glob("*.py") if file.name != "__init__.py"]) > MAX_MODULES:
            yield f"{_name(directory)} has more than {MAX_MODULES} modules"
    for file in FILES:
        source = file.read_text()
        if source.count("\n") > MAX_LINES:
            yield f"{_name(file)} has more than {MAX_LINES} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _own_lines(node) > MAX_FUNCTION_LINES:
                yield f"{_name(file)}: {node.name}() has more than {MAX_FUNCTION_LINES} lines"


def _own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    # A router's factory is as long as its routes, each of which is a function of its own.
    return _lines(node) - sum(_lines(inner) for inner in node.body if isinstance(inner, ast.AsyncFunctionDef))


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_packages_files_and_functions_are_small() -> None:
    assert list(_above_limits()) == []


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_the_first_line_states_the_job(file: Path) -> None:
    source = file.read_text()
    assert not source or (ast.get_docstring(ast.parse(source)) or "").strip()


def test_the_design_names_every_package() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    for top in {file if file.parent in PACKAGES else file.parent for file in FILES}:
        short = f"{top.name}/" if top.is_dir() else top.stem
        assert short.startswith("__") or f"`{short}`" in design or f"`{_name(top)}`" in design, top


def test_the_design_names_files_that_exist() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`((?:agx|opale|sidecar|tests)/[\w/]+(?:\.py)?)`", design))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_no_private_name_of_a_library_is_used(file: Path) -> None:
    """Private modules and names of pydantic-ai, redis-py and OpenTelemetry change without notice."""
    tree = ast.parse(file.read_text())
    assert not list(_private_names(tree))


def _private_names(tree: ast.Module) -> Iterator[str]:
    own = {"__future__", "agx", "agx_sidecar", "opale"}
    defined = set(_defined_names(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if any(map(_is_private, name.name.split("."))))
            case ast.ImportFrom(module=str(module), names=names, level=0) if module.partition(".")[0] not in own:
                imported = (f"{module}.{name.name}" for name in names)
                yield from (name for name in imported if any(map(_is_private, name.split("."))))
            case ast.Attribute(attr=name) if _is_private(name) and name not in defined:
                yield ast.unparse(node)


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                yield name


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize(
    "source",
    [
        "from pydantic_ai._agent_graph import x",
        "from pydantic_ai import _utils",
        "import redis._parsers",
        "def f(client): client._parser",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert list(_private_names(ast.parse(source)))


@pytest.mark.parametrize("file", TEST_FILES, ids=_name)
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
