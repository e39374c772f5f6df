"""Numbers as the boards' units show them."""

from __future__ import annotations

import math
from collections.abc import Callable

_SHORT = ((1e9, "B"), (1e6, "M"), (1e3, "K"))
_BYTES = ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"))


def text(value: float, unit: str) -> str:
    """Return a value with its unit; a dash for no number."""
    if not math.isfinite(value):
        return "+Inf" if value > 0 else "-"
    return _UNITS[unit](value)


def _scaled(value: float, steps: tuple[tuple[float, str], ...], last: str) -> str:
    for size, name in steps:
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g}{last}"


def _seconds(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value and abs(value) < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if abs(value) < 120 else f"{value / 60:.3g} min"


_UNITS: dict[str, Callable[[float], str]] = {
    "locale": lambda value: f"{value:,.0f}",
    "short": lambda value: _scaled(value, _SHORT, ""),
    "suffix:/s": lambda value: f"{value:.3g}/s" if abs(value) < 1000 else f"{value:.0f}/s",
    "percentunit": lambda value: f"{value * 100:.3g}%",
    "currencyUSD": lambda value: f"${value:.2f}" if abs(value) >= 0.01 or not value else f"${value:.2g}",
    "Bps": lambda value: _scaled(value, _BYTES, " B/s"),
    "s": _seconds,
}
