"""Output for people: tables, JSON, durations. Text of models and tenants can't control the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

import orjson

from ..errors import AgxError
from ..facts.outcome_marks import COLOURS

if TYPE_CHECKING:
    from rich.console import Console

# Escape sequences, other control characters, and those that change the direction of the following text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_control(text: object) -> str:
    """Return a text without control characters."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def open_console() -> Console:
    """Return the terminal; raises AgxError where the package for it is missing."""
    if find_spec("rich") is None:
        raise AgxError("the package rich is missing: pip install 'opale-agent-stream[cli]', or ask for --json")
    from rich.console import Console  # noqa: PLC0415 - it is an extra's

    return Console(highlight=False, markup=False, emoji=False)


def print_table(
    heads: Sequence[str], rows: Iterable[Iterable[object]], *, right: Sequence[str] = (), least: Sequence[str] = ()
) -> None:
    """Print a table; `right`: heads of columns of numbers, `least`: those that a narrow terminal can do without.

    Nothing is cut, since part of a number or name would be wrong: what is still too wide wraps.
    """
    console = open_console()
    from rich.cells import cell_len  # noqa: PLC0415 - it is an extra's
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    lines = [[without_control(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(heads, *lines, strict=True)]
    shown = list(range(len(heads)))
    for head in least if console.is_terminal else ():
        if sum(widths[n] + 2 for n in shown) - 2 > console.width:
            shown.remove(heads.index(head))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for n in shown:
        table.add_column(heads[n], justify="right" if heads[n] in right else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(line[n], COLOURS.get(line[n], "")) for n in shown))
    console.width = 10_000
    console.print(table, soft_wrap=True)


def print_json(value: object, file: TextIO | None = None) -> None:
    """Print one line of JSON, on standard output where no file is given."""
    print(orjson.dumps(value).decode(), file=file, flush=True)


def format_duration(ms: int) -> str:
    """Return a duration in a few characters."""
    seconds = max(0, ms) / 1_000
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = int(seconds) // 60
    return f"{minutes}m{int(seconds) % 60:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
