"""How text displays show the outcome of a run: its mark and its colour; the command line, the demo and the console."""

from __future__ import annotations

MARKS: dict[str, str] = {
    "completed": "✔",
    "cancelled": "■",
    "failed": "✘",
    "lost": "☠",
}
# A terminal's names of colours.
COLOURS: dict[str, str] = {"completed": "green", "cancelled": "yellow", "failed": "red", "lost": "magenta"}
