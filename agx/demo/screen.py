"""What the demo looks like: a card per live run, a line per finished one, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from textwrap import wrap

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..facts import Outcome
from .comparison import Row
from .ledger import Ledger, Ran
from .traffic import Card

_STYLE: dict[Outcome, str] = {"completed": "green", "cancelled": "yellow", "failed": "red", "lost": "magenta"}
_MARK: dict[Outcome, str] = {"completed": "✔", "cancelled": "■", "failed": "✘", "lost": "☠"}
_CARD_HEIGHT = 7
_CARD_WIDTH = 44
_LINGER = 3.0  # seconds that a card stays after its run


class Screen:
    """Draws on one console; asked for a new picture several times a second."""

    def __init__(self, console: Console, cards: Sequence[Card], ledger: Ledger, addresses: dict[str, str]) -> None:
        self._console = console
        self._cards = cards
        self._ledger = ledger
        self._addresses = addresses

    def draw(self) -> RenderableType:
        """Return the picture of this moment: as many cards as fit, live ones and those that just ended."""
        now = time.perf_counter()
        recent = [card for card in self._cards if card.ran is None or now - card.began - card.ran.seconds < _LINGER]
        columns = max(1, self._console.width // _CARD_WIDTH)
        rows = max(1, (self._console.height - 6) // _CARD_HEIGHT)
        shown = recent[-columns * rows :]
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._card(card, now) for card in shown]
        for i in range(0, len(panels), columns):
            grid.add_row(*panels[i : i + columns])
        return Group(self._head(), grid)

    def welcome(self) -> RenderableType:
        """Return what stays on the screen: where to look."""
        return Group(Text("agx demo", "bold cyan"), *self._where())

    def line(self, ran: Ran) -> Text:
        """Return the line of a finished run."""
        style = _STYLE[ran.outcome]
        why = ran.error_type or ran.reason or ""
        who = f"{ran.scope}/{ran.user}/{ran.session}"
        tokens = f"{ran.tokens['input']:>5} in {ran.tokens['output']:>4} out"
        return Text.assemble(
            (f"{_MARK[ran.outcome]} {ran.outcome:<9}", style),
            f"  {ran.agent:<8} {who:<20} {tokens} {ran.seconds:>6.2f} s  ",
            (why, style),
        )

    def table(self, rows: Sequence[Row]) -> RenderableType:
        """Return the comparison, and below it whatever differs."""
        table = Table(box=box.SIMPLE_HEAD, title="What ran, and what the sidecar's /metrics says", title_justify="left")
        table.add_column("")
        table.add_column("ran", justify="right")
        table.add_column("/metrics", justify="right")
        table.add_column("")
        for row in rows:
            mark = Text("✔", "green") if row.agrees else Text("✘ differs", "bold red")
            table.add_row(row.what, _number(row.ran), _number(row.counted), mark)
        differences = [Text(f"  {text}", "red") for row in rows for text in row.differences]
        verdict = Text("They differ.", "bold red") if differences else Text("Every number agrees.", "bold green")
        return Group(table, *differences, verdict)

    def _head(self) -> RenderableType:
        live = sum(card.ran is None for card in self._cards)
        text = Text.assemble(("agx demo", "bold cyan"), f"   {live} live")
        for outcome, count in self._ledger.outcomes().items():
            text.append(f"   {_MARK[outcome]} {count} {outcome}", _STYLE[outcome])
        text.append(f"   {self._ledger.tokens().total():,} tokens")
        return Group(text, *self._where())

    def _where(self) -> list[Text]:
        return [Text.assemble((f"{name:>9}  ", "dim"), address) for name, address in self._addresses.items()]

    def _card(self, card: Card, now: float) -> Panel:
        style = _STYLE[card.ran.outcome] if card.ran else "cyan"
        width = max(20, self._console.width // max(1, self._console.width // _CARD_WIDTH) - 4)
        lines = [Text(_cut(card.prompt, width), "italic dim")]
        for what, outcome in list(card.calls.values())[-2:]:
            colour = "green" if outcome == "ok" else "dim" if outcome == "…" else "yellow"
            lines.append(Text.assemble(("⚙ ", "blue"), _cut(what, width - len(outcome) - 3), " ", (outcome, colour)))
        room = _CARD_HEIGHT - 2 - len(lines)
        wrapped = [line for paragraph in card.text.splitlines() for line in wrap(paragraph, width)]
        if card.ran is None and not wrapped:
            wrapped = ["thinking" if card.thinking else ""]
        if card.ran is None:
            wrapped[-1] += " ▌"
        lines += map(Text, wrapped[-room:])
        seconds = card.ran.seconds if card.ran else now - card.began
        ending = f"{_MARK[card.ran.outcome]} {card.ran.outcome}" if card.ran else "live"
        return Panel(
            Group(*lines),
            title=f"[bold]{card.agent}[/] {card.scope}/{card.user}/{card.session}",
            title_align="left",
            subtitle=f"{ending} · {seconds:.1f} s",
            subtitle_align="right",
            border_style=style,
            height=_CARD_HEIGHT,
        )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
