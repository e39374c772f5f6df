"""Draws a board: each panel at its place on the grid, from the answers of Prometheus to its own queries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dashboards.preview.stack import Stack
from dashboards.preview.units import text

mpl.use("agg")

CELL_W, CELL_H = 0.8, 0.42  # inches per cell of the grid
PAGE, PANEL, EDGE, INK, FAINT = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#7b8087"
NAMED = {"green": "#73bf69", "red": "#f2495c", "blue": "#5794f2", "purple": "#b877d9"}
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#56a64b", "#fade2a", "#a352cc")
POINTS = 60


@dataclass(frozen=True, slots=True)
class Window:
    """The time to show; seconds since the epoch."""

    start: float
    end: float

    @property
    def step(self) -> float:
        return max(1.0, (self.end - self.start) / POINTS)


@dataclass(frozen=True, slots=True)
class Line:
    """One series as the panel names it."""

    name: str
    at: np.ndarray[Any, np.dtype[np.float64]]
    values: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def last(self) -> float:
        numbers = self.values[np.isfinite(self.values)]
        return float(numbers[-1]) if len(numbers) else math.nan


def draw(board: dict[str, Any], stack: Stack, window: Window, into: Path) -> None:
    """Draw one board as a PNG."""
    unfolded = list(unfold(board))
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in unfolded) + 1
    width, height = 24 * CELL_W, rows * CELL_H
    figure = Figure(figsize=(width, height), facecolor=PAGE)
    figure.text(0.006, 1 - 0.55 * CELL_H / height, board["title"], color=INK, fontsize=15, va="center", weight="bold")
    for panel in unfolded:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - (place["y"] + 1) / rows
        if panel["type"] == "row":
            title = panel["title"] + (" (folded)" if panel["collapsed"] else "")
            figure.text(left + 0.006, top - 0.5 / rows, f"⌄  {title}", color=INK, fontsize=12, va="center")
            continue
        box = figure.add_axes(
            (left + 0.002, top - place["h"] / rows + 0.1 / rows, place["w"] / 24 - 0.004, (place["h"] - 0.2) / rows)
        )
        box.set(xticks=[], yticks=[], facecolor=PANEL, xlim=(0, 1), ylim=(0, 1))
        for side in box.spines.values():
            side.set_color(EDGE)
        head = 0.75 / place["h"]
        box.text(
            0.012,
            1 - head / 2,
            panel["title"],
            color=INK,
            fontsize=10,
            va="center",
        )
        _KINDS[panel["type"]](box, panel, stack, window, head)
    figure.savefig(into, dpi=80)


def unfold(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield headings and panels at their places with all rows open."""
    below = 0
    for panel in board["panels"]:
        inside = panel["panels"] if panel["type"] == "row" else []
        for each in (panel, *inside):
            yield each | {"gridPos": each["gridPos"] | {"y": each["gridPos"]["y"] + below}}
        if inside:
            below += max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in inside) - panel["gridPos"]["y"] - 1


def ask(panel: dict[str, Any], target: dict[str, Any], stack: Stack, window: Window) -> list[Line]:
    """Return the series of one query of a panel."""
    expr = fill(target["expr"], window)
    if target.get("instant"):
        found = [{"metric": s["metric"], "values": [s["value"]]} for s in stack.query(expr)]
    else:
        found = stack.query_range(expr, window.start, window.end, window.step)
    lines = []
    for series in found:
        legend = target["legendFormat"]
        labels = series["metric"]
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            legend = legend.replace("{{%s}}" % label, labels.get(label, ""))  # noqa: UP031 - braces
        name = next(iter(labels.values()), panel["title"]) if legend == "__auto" else legend
        at, values = np.array(series["values"], dtype=float).T
        lines.append(Line(name.strip(" ,"), at, values))
    return lines


def fill(expr: str, window: Window) -> str:
    """Return a query with Grafana's variables filled in; of ours, everything is chosen. Yesterday is seconds ago."""
    expr = expr.replace("$__rate_interval", "10s").replace("$__range", f"{round(window.end - window.start)}s")
    expr = expr.replace("offset 1d", "offset 20s").replace("offset 1w", "offset 40s")
    return re.sub(r"\$[a-z]+", ".*", expr)


def _colour(panel: dict[str, Any], name: str, number: int) -> str:
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == name:
            for change in override["properties"]:
                if change["id"] == "color":
                    colour = str(change["value"]["fixedColor"])
                    return NAMED.get(colour, colour)
    return PALETTE[number % len(PALETTE)]


def _inner(box: Axes, head: float, *, left: float = 0.09, right: float = 0.02, bottom: float = 0.2) -> Axes:
    axes = box.inset_axes((left, bottom, 1 - left - right, 1 - head - bottom - 0.03))
    axes.set_facecolor(PANEL)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _clock(axes: Axes, window: Window) -> None:
    axes.set_xlim(window.start, window.end)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{(at - window.end) / 60:+.1f} min"))


def _timeseries(box: Axes, panel: dict[str, Any], stack: Stack, window: Window, head: float) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    custom = panel["fieldConfig"]["defaults"]["custom"]
    lines = [line for target in panel["targets"] for line in ask(panel, target, stack, window)]
    axes = _inner(box, head)
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    floor: dict[float, float] = {}
    for number, line in enumerate(lines):
        colour = _colour(panel, line.name, number)
        values = np.nan_to_num(line.values) if stacked else line.values
        if stacked:
            below = np.array([floor.get(at, 0.0) for at in line.at])
            floor.update(zip(line.at, below + values, strict=True))
            axes.fill_between(line.at, below, below + values, color=colour, alpha=0.55, linewidth=0)
            values = below + values
        elif line.name != "threshold":
            axes.fill_between(line.at, 0, values, color=colour, alpha=0.08, linewidth=0)
        axes.plot(line.at, values, color=colour, linewidth=1.2, linestyle="--" if line.name == "threshold" else "-")
    _clock(axes, window)
    axes.set_ylim(bottom=0, top=panel["fieldConfig"]["defaults"].get("max"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value, unit)))
    axes.grid(color=EDGE, linewidth=0.6)
    _legend(box, panel, lines, unit)


def _legend(box: Axes, panel: dict[str, Any], lines: list[Line], unit: str) -> None:
    width = box.get_position().width * 24 * CELL_W * 17  # characters that fit
    x = 0.012
    for number, line in enumerate(lines):
        entry = f"{line.name}  {text(line.last, unit)}"
        if x + (len(entry) + 4) / width > 1:
            box.text(x, 0.055, f"+{len(lines) - number}", color=FAINT, fontsize=8, va="center")
            return
        box.plot([x, x + 1.6 / width], [0.055, 0.055], color=_colour(panel, line.name, number), linewidth=3)
        box.text(x + 2.4 / width, 0.055, entry, color=FAINT, fontsize=7.5, va="center")
        x += (len(entry) + 4) / width


def _stat(box: Axes, panel: dict[str, Any], stack: Stack, window: Window, head: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    (line,) = ask(panel, panel["targets"][0], stack, window)
    colour = NAMED["green"]
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or line.last >= step["value"]:
            colour = NAMED.get(step["color"], step["color"])
    axes = _inner(box, head, left=0, right=0, bottom=0)
    axes.fill_between(line.at, 0, line.values, color=colour, alpha=0.12, linewidth=0)
    axes.plot(line.at, line.values, color=colour, linewidth=1)
    highest = np.nanmax(line.values) if np.isfinite(line.values).any() else 1
    axes.set(xticks=[], yticks=[], xlim=(window.start, window.end), ylim=(0, (highest or 1) * 2.5))
    shown = text(line.last, defaults["unit"])
    axes.text(
        0.5, 0.55, shown, transform=axes.transAxes, color=colour, fontsize=21, ha="center", va="center", weight="bold"
    )


def _heatmap(box: Axes, panel: dict[str, Any], stack: Stack, window: Window, head: float) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    target = panel["targets"][0]
    lines = sorted(ask(panel, target, stack, window), key=lambda line: float(line.name))
    columns = sorted({at for line in lines for at in line.at})
    cumulative = np.zeros((len(lines), len(columns)))
    for row, line in enumerate(lines):
        places = np.searchsorted(columns, line.at)
        cumulative[row, places] = np.nan_to_num(line.values)
    cells = np.diff(cumulative, axis=0, prepend=0)
    used = np.flatnonzero(cells.sum(axis=1) > 1e-9)
    axes = _inner(box, head, bottom=0.1)
    low, high = (max(0, used[0] - 1), min(len(lines) - 1, used[-1] + 1)) if len(used) else (0, len(lines) - 1)
    shown = np.sqrt(np.where(cells > 1e-9, cells, np.nan))[low : high + 1]
    edges = [*columns, columns[-1] + window.step]
    axes.pcolormesh(edges, range(low, high + 2), shown, cmap="Oranges", edgecolors=PANEL, linewidth=0.3)
    _clock(axes, window)
    axes.set_yticks(range(low + 1, high + 2, max(1, (high - low) // 5)))
    axes.set_yticklabels([text(float(lines[n - 1].name), unit) for n in axes.get_yticks()])


def _bargauge(box: Axes, panel: dict[str, Any], stack: Stack, window: Window, head: float) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    colour = panel["fieldConfig"]["defaults"]["color"]["fixedColor"]
    lines = ask(panel, panel["targets"][0], stack, window)[:8]
    highest = max((line.last for line in lines), default=1) or 1
    for number, line in enumerate(lines):
        y = 1 - head - 0.08 - number * 0.11
        box.text(0.3, y, line.name, color=INK, fontsize=9, ha="right", va="center")
        box.barh(y, 0.5, height=0.07, left=0.32, color=EDGE)
        box.barh(y, 0.5 * line.last / highest, height=0.07, left=0.32, color=NAMED.get(colour, colour))
        box.text(0.84, y, text(line.last, unit), color=INK, fontsize=9, va="center")


def _table(box: Axes, panel: dict[str, Any], stack: Stack, window: Window, head: float) -> None:
    organised = panel["transformations"][-1]["options"]
    titles = dict(sorted(organised["renameByName"].items(), key=lambda item: organised["indexByName"][item[0]]))
    if panel["datasource"]["type"] != "prometheus":
        _write_rows(box, head, list(titles.values()), [[span[name] for name in titles] for span in stack.bad_runs()])
        return
    looks = {
        override["matcher"]["options"]: {change["id"]: change["value"] for change in override["properties"]}
        for override in panel["fieldConfig"]["overrides"]
    }
    labels = [name for name in titles if not name.startswith("Value #")]
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for target in panel["targets"]:
        for series in stack.query(fill(target["expr"], window)):
            key = tuple(series["metric"].get(label, "") for label in labels)
            rows.setdefault(key, {})[titles[f"Value #{target['refId']}"]] = float(series["value"][1])
    values = [titles[f"Value #{target['refId']}"] for target in panel["targets"]]
    ordered = sorted(rows.items(), key=lambda row: -row[1].get(values[0], 0))
    columns = [titles[label] for label in labels] + values
    body = [[*key, *(text(cells.get(v, math.nan), looks[v]["unit"]) for v in values)] for key, cells in ordered[:8]]
    _write_rows(box, head, columns, body)


def _write_rows(box: Axes, head: float, columns: list[str], body: list[list[str]]) -> None:
    for n, line in enumerate([columns, *body[:8]]):
        y = 1 - head - 0.06 - n * 0.095
        for column, cell in enumerate(line):
            x = 0.015 + column / len(columns)
            box.text(x, y, cell, color=NAMED["blue"] if n == 0 else INK, fontsize=9, va="center")


_KINDS = {"timeseries": _timeseries, "stat": _stat, "heatmap": _heatmap, "bargauge": _bargauge, "table": _table}
