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

# What Grafana would put in for its own variables and for ours with "All" chosen. A day passes in a second.
VARIABLES = {"$__rate_interval": "10s", "$__range": "1m", "offset 1d": "offset 1s", "offset 1w": "offset 7s"}

# Every board has the same ones.
MARKS = next(iter(BOARDS.values()))["annotations"]["list"]

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

    @property
    def title(self) -> str:
        """The panel's title without its unit and what it covers."""
        return re.split(r" [\[(]", str(self.panel["title"]))[0]


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels of a board, those of folded rows too; the rows' headings are left out."""
    for panel in board["panels"]:
        yield from panel["panels"] if panel["type"] == "row" else [panel]


def targets() -> Iterator[Target]:
    """Yield every query to Prometheus of every board."""
    for name, board in BOARDS.items():
        for panel in panels(board):
            for target in panel["targets"] if panel["datasource"]["type"] == "prometheus" else ():
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
