"""The boards against Grafana's own types (npm `@grafana/schema`), strictly: unknown properties are errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from ops.boards import BOARDS, panels

pytestmark = [pytest.mark.npm, pytest.mark.timeout(400)]  # npm downloads

SOURCE = Path(__file__).parent / "grafana"


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """JSON schemas of a board, a panel, and of each kind of panel's options and field configuration."""
    work = tmp_path_factory.mktemp("grafana")
    for path in SOURCE.iterdir():
        if path.is_file():
            shutil.copy(path, work)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=work, check=True, timeout=300, capture_output=True)
    done = subprocess.run(["node", "schemas.mjs"], cwd=work, check=True, timeout=60, capture_output=True)
    made: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return made


def _problems(schema: dict[str, Any], value: object, where: str) -> list[str]:
    found = Draft7Validator(schema).iter_errors(value)
    return [f"{where} {list(problem.absolute_path)}: {problem.message[:300]}" for problem in found]


def test_every_board_and_panel_is_what_grafana_takes(schemas: dict[str, dict[str, Any]]) -> None:
    problems = []
    for name, board in BOARDS.items():
        problems += _problems(schemas["board"], _without_queries(board), name)
        for panel in panels(board):
            where = f"{name}: {panel['title']}"
            kind = panel["type"]
            problems += _problems(schemas["panel"], panel, where)
            problems += _problems(schemas[f"{kind} options"], panel["options"], where)
            if custom := panel["fieldConfig"]["defaults"].get("custom"):
                problems += _problems(schemas[f"{kind} field"], custom, where)
    assert problems == []


def _without_queries(board: dict[str, Any]) -> dict[str, Any]:
    """Return a board without what a data source reads of a mark: Grafana's type knows only its own store's query."""
    marks = [
        {key: value for key, value in mark.items() if key not in ("target", "titleFormat", "textFormat")}
        for mark in board["annotations"]["list"]
    ]
    return board | {"annotations": {"list": marks}}


def test_the_schemas_are_strict(schemas: dict[str, dict[str, Any]]) -> None:
    board = next(iter(BOARDS.values()))
    assert _problems(schemas["board"], board | {"titel": "x"}, "")
    assert _problems(schemas["stat options"], {"graphMode": "curve"}, "")
