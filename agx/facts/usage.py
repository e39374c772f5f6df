"""Converts tokens and cost of a model response from pydantic-ai's values, or estimates the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from typing import Any

from .schema import Usage

_NANO = 10**9
_LARGEST = 2**63 - 1
_CHARS_PER_TOKEN = 4  # a usual approximation; usage that is computed with it is marked as estimated
# What providers call reasoning tokens in `details`. Newer versions of pydantic-ai have a field for them too.
_REASONING = ("reasoning_tokens", "thoughts_tokens", "thinking_tokens", "output_reasoning_tokens")


def convert_usage(get: Callable[[str], Any]) -> Usage:
    """Return the tokens and the cost of a response; `get` returns a field of its usage by name, or None."""
    details = get("details")
    reasoning = to_count(get("output_reasoning_tokens"))
    if isinstance(details, dict) and details:
        reasoning = max(reasoning, *(to_count(details.get(name)) for name in _REASONING))
    return Usage(
        input=to_count(get("input_tokens")),
        output=to_count(get("output_tokens")),
        cache_read=to_count(get("cache_read_tokens")),
        cache_write=to_count(get("cache_write_tokens")),
        reasoning=reasoning,
        cache_write_1h=to_count(get("cache_write_1h_tokens")),
        cost_nano_usd=_to_nano_usd(get("cost")),
    )


def estimate_usage(input_chars: int, output_chars: int) -> Usage:
    """Return an estimate for a request that was cut off before the provider reported its usage."""
    return Usage(input=_tokens(input_chars), output=_tokens(output_chars), source="estimated")


def _tokens(chars: int) -> int:
    return -(-chars // _CHARS_PER_TOKEN)


def to_count(value: object) -> int:
    """Return a number of tokens; a provider may send a float, a text or 2^70 (issue 12, case A11)."""
    if value is None:
        return 0
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return 0
    if isinstance(value, float) and not math.isfinite(value):
        return 0
    return min(max(int(value), 0), _LARGEST) if isinstance(value, int | float) else 0


def to_text(value: object) -> Any:
    """Return a name as text; a provider may send a number (issue 12, case A11)."""
    return value if value is None or isinstance(value, str) else str(value)


def _to_nano_usd(cost: object) -> int | None:
    if not isinstance(cost, Decimal | int | float | str) or isinstance(cost, bool):
        return None
    try:
        usd = Decimal(str(cost))
    except InvalidOperation:
        return None
    if not usd.is_finite():
        return None
    nano = (usd * _NANO).to_integral_value(ROUND_HALF_EVEN)
    return min(max(int(nano), 0), _LARGEST)
