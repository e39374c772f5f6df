"""The tables: each figure beside its goal, the limit and the peer, and how cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parent / "README.md"
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `met`: None where there is no goal."""

    what: str
    goal: str
    limit: str
    agx: str
    peer: str
    met: bool | None = None

    def cells(self) -> list[str]:
        verdict = {True: "yes", False: "**no**", None: ""}[self.met]
        return [self.what, self.goal, verdict, self.agx, self.limit, self.peer]


HEADINGS = ["what", "goal", "met", "agx", "limit", "peer"]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its columns aligned."""
    widths = [max(len(row[n]) for row in (headings, *rows)) for n in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(headings), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def write(measured: str) -> None:
    """Put the tables between the marks of the README."""
    before, _, rest = README.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    README.write_text(f"{before}{_BEGIN}\n\n{measured}\n\n{_END}{after}")
