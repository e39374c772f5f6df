"""Draws the boards with Grafana's own components in a Chromium, which shows more than a plot, such as cut titles.

The page is `grafana_page/board.jsx`. Grafana's components have no heatmap; matplotlib draws those (`draw.py`).
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from dashboards.preview.draw import Window, ask, fill, unfold
from dashboards.preview.stack import ROOT, Stack

SOURCE = Path(__file__).parent / "grafana_page"
WORK = ROOT / "build" / "grafana"
_DRAWN = 3_000  # ms that the components take to draw


def draw_boards(boards: dict[str, dict[str, Any]], stack: Stack, window: Window, into: Path) -> None:
    """Draw each board, all rows open, into NAME.grafana.png."""
    answered = {name: _answer(board, stack, window) for name, board in boards.items()}
    data = {"boards": answered, "from": window.start * 1000, "to": window.end * 1000}
    with _serving(json.dumps(data)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1200})
        for name in boards:
            page.goto(f"{address}/?board={name}")
            page.wait_for_timeout(_DRAWN)
            page.screenshot(path=into / f"{name}.grafana.png", full_page=True)
            print(f"drew {into / name}.grafana.png", flush=True)
        browser.close()


def _answer(board: dict[str, Any], stack: Stack, window: Window) -> dict[str, Any]:
    panels = list(unfold(board))
    answers = {panel["id"]: _answer_panel(panel, stack, window) for panel in panels if panel["type"] != "row"}
    return {"board": [panel | {"panels": []} for panel in panels], "panels": answers}


def _answer_panel(panel: dict[str, Any], stack: Stack, window: Window) -> list[dict[str, Any]]:
    """Return the lines of a plot, or the rows of a table."""
    if panel["type"] != "table":
        found = [line for target in panel["targets"] for line in ask(panel, target, stack, window)]
        return [
            {
                "name": line.name,
                "at": [at * 1000 for at in line.at],
                "values": [_finite(value) for value in line.values],
            }
            for line in found
        ]
    if panel["datasource"]["type"] != "prometheus":
        return list(stack.bad_runs())
    rows: dict[frozenset[tuple[str, str]], dict[str, Any]] = {}
    for target in panel["targets"]:
        for series in stack.query(fill(target["expr"], window)):
            row = rows.setdefault(frozenset(series["metric"].items()), dict(series["metric"]))
            row[f"Value #{target['refId']}"] = _finite(float(series["value"][1]))
    return sorted(rows.values(), key=lambda row: -(row.get("Value #A") or 0))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no others


@contextmanager
def _serving(data: str) -> Iterator[str]:
    """Build the page with its data, and serve it on loopback."""
    print("building the page: npm install, vite build ...", flush=True)
    shutil.copytree(SOURCE, WORK, dirs_exist_ok=True)
    for command in ("npm install --no-audit --no-fund --legacy-peer-deps", "npx vite build"):
        subprocess.run(command.split(), cwd=WORK, check=True, timeout=600, stdout=subprocess.DEVNULL)  # noqa: S603
    (WORK / "dist" / "data.json").write_text(data)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(WORK / "dist")))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
