"""Reads the committed boards and rules for their tests: panels, queries and the metrics these name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agx_sidecar.metrics.instruments import CATALOGUE
from agx_sidecar.semconv import RELEASED

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards" / "rules" / "agx.rules.yaml"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "dashboards" / "json").glob("*.json"))}

# What Grafana would put in for its own variables and for ours with "All" chosen.
VARIABLES = {"$__rate_interval": "10s", "$__range": "1m"}

_NAME = re.compile(r"\b(?:agx|gen_ai)_[a-z0-9_]+")
_LABEL_USES = re.compile(r"\b(?:by|without|on)\s*\([^)]*\)|\{[^}]*\}")
_SUFFIX = re.compile(r"_(bucket|count|sum)$")
BY_NAME = {each.name: each for each in (*CATALOGUE, *(name.target for name in RELEASED))}
_HISTOGRAMS = {name for name, instrument in BY_NAME.items() if instrument.kind == "histogram"}


@dataclass(frozen=True, slots=True)
class Target:
    """One query of one panel, with the variables filled in."""

    board: str
    panel: dict[str, Any]
    expr: str

    @property
    def name(self) -> str:
        return f"{self.board}: {self.panel['title']}"


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels of a board, its rows' headings left out."""
    yield from (panel for panel in board["panels"] if panel["type"] != "row")


def targets() -> Iterator[Target]:
    """Yield every query of every board."""
    for name, board in BOARDS.items():
        for panel in panels(board):
            for target in panel["targets"]:
                yield Target(name, panel, filled(target["expr"]))


def filled(expr: str) -> str:
    """Return a query with its variables filled in."""
    for variable, value in VARIABLES.items():
        expr = expr.replace(variable, value)
    return re.sub(r"\$\w+", ".*", expr)


def rules() -> Iterator[dict[str, Any]]:
    """Yield every rule."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def metrics_in(expr: str) -> set[str]:
    """Return the metrics that a query names, without what histograms append to theirs."""
    found = set(_NAME.findall(_LABEL_USES.sub("", re.sub(r'"[^"]*"', '""', expr))))
    return {bare if (bare := _SUFFIX.sub("", name)) in _HISTOGRAMS else name for name in found}
