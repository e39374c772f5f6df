"""Draws the demo: a panel for each live run, a line for each finished one, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from textwrap import wrap
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..facts.outcome_marks import COLOURS, MARKS
from .comparison import Row
from .finished_runs import FinishedRun, FinishedRuns
from .run_view import RunView

_PANEL_HEIGHT = 8
_PANEL_WIDTH = 44
_LINGER = 3.0  # seconds that a panel stays after its run


class Screen:
    """The demo's output. Between `__enter__` and `__exit__` a terminal shows the live runs below the finished ones."""

    def __init__(self, console: Console, finished_runs: FinishedRuns, addresses: dict[str, str]) -> None:
        self._console = console
        self._finished = finished_runs
        self._addresses = [
            Text.assemble((f"{name:>9}  ", "dim"), address, no_wrap=True) for name, address in addresses.items()
        ]
        self._slots: list[RunView | None] = []  # a run keeps its place on the screen
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def add(self, view: RunView) -> None:
        """Show a run that begins, in the first free place."""
        if None in self._slots:
            self._slots[self._slots.index(None)] = view
        else:
            self._slots.append(view)

    def print_finished(self, run: FinishedRun) -> None:
        """Print the line of a finished run."""
        style = COLOURS[run.outcome]
        why = run.note or (run.error_type or run.reason or "").rpartition(".")[2]
        who = f"{run.scope}/{run.user}/{run.session}"
        tokens = f"{run.tokens['input']:>5} in {run.tokens['output']:>4} out"
        line = Text.assemble(
            (f"{MARKS[run.outcome]} {run.outcome:<9}", style),
            f"  {run.agent:<8} {who:<20} {tokens} {run.seconds:>6.2f} s  ",
            (why, style),
        )
        self._console.print(line, soft_wrap=True)

    def compare(self, rows: Sequence[Row]) -> None:
        """Print the comparison, and the differences below it."""
        table = Table(box=box.SIMPLE_HEAD, title="What ran, and what the sidecar's /metrics says", title_justify="left")
        table.add_column("")
        table.add_column("ran", justify="right")
        table.add_column("/metrics", justify="right")
        table.add_column("")
        for row in rows:
            mark = Text("✔", "green") if row.agrees else Text("✘ differs", "bold red")
            least = "" if row.exact else "≥ "
            table.add_row(row.what, f"{least}{_number(row.expected)}", _number(row.counted), mark)
        self._console.print(table)
        differences = [text for row in rows for text in row.differences]
        for text in differences:
            self._console.print(Text(f"  {text}", "red"), soft_wrap=True)
        verdict = Text("They differ.", "bold red") if differences else Text("Every number agrees.", "bold green")
        self._console.print(verdict)

    def draw(self, *, ending: bool = False) -> None:
        """Draw the current state; do nothing where the output is no terminal."""
        if not self._console.is_terminal:
            return
        now = time.perf_counter()
        for i, view in enumerate(self._slots):
            if view and view.finished and now - view.finished_at > _LINGER:
                self._slots[i] = None
        while self._slots and self._slots[-1] is None:
            self._slots.pop()
        self._live.update(self._picture(now, ending=ending), refresh=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._console.print(*self._addresses, sep="\n", soft_wrap=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def _picture(self, now: float, *, ending: bool) -> RenderableType:
        columns = max(1, self._console.width // _PANEL_WIDTH)
        rows = max(1, (self._console.height - 6) // _PANEL_HEIGHT)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        width = self._console.width // columns - 4
        cards = [self._panel(view, width, now) if view else "" for view in self._slots[: columns * rows]]
        for i in range(0, len(cards), columns):
            grid.add_row(*cards[i : i + columns])
        return Group(self._head(ending=ending), *self._addresses, grid)

    def _head(self, *, ending: bool) -> Text:
        live = sum(view is not None and view.finished is None for view in self._slots)
        text = Text.assemble(("agx demo", "bold cyan"), f"   {live} live")
        for outcome, count in sorted(self._finished.outcomes().items()):
            text.append(f"   {MARKS[outcome]} {count} {outcome}", COLOURS[outcome])
        text.append(f"   {self._finished.tokens().total():,} tokens")
        return text.append("   ending", "bold") if ending else text

    def _panel(self, view: RunView, width: int, now: float) -> Panel:
        lines = [Text(_cut(view.prompt, width), "italic dim")]
        for what, outcome in list(view.calls.values())[-2:]:
            colour = "green" if outcome == "ok" else "dim" if outcome == "…" else "yellow"
            lines.append(Text.assemble(("⚙ ", "blue"), _cut(what, width - len(outcome) - 3), " ", (outcome, colour)))
        if view.note:
            lines.append(Text(_cut(view.note, width), "bold magenta"))
        space = _PANEL_HEIGHT - 2 - len(lines)
        lines_of_text = [line for paragraph in view.text.splitlines() for line in wrap(paragraph, width - 2)]
        if view.finished is None:
            lines_of_text = lines_of_text or ["thinking" if view.thinking else ""]
            lines_of_text[-1] = f"{lines_of_text[-1]} ▌".strip()
        lines += map(Text, lines_of_text[-space:])
        seconds = view.finished.seconds if view.finished else now - view.began
        state = f"{MARKS[view.finished.outcome]} {view.finished.outcome}" if view.finished else "live"
        return Panel(
            Group(*lines),
            title=f"[bold]{view.agent}[/] {view.scope}/{view.user}/{view.session}",
            title_align="left",
            subtitle=f"{state} · {seconds:.1f} s",
            subtitle_align="right",
            border_style=COLOURS[view.finished.outcome] if view.finished else "cyan",
            height=_PANEL_HEIGHT,
        )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
