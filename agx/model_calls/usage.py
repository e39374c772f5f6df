"""Tokens and cost of a model response, as pydantic-ai reports them, or estimated where a request was cut off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from pydantic_ai.messages import BaseToolCallPart, BaseToolReturnPart, ModelMessage
from pydantic_ai.usage import RequestUsage

from ..facts.schema import Usage

_CHARS_PER_TOKEN = 4  # a rule of thumb; what is counted with it is marked as estimated
_NANO = 10**9
_LARGEST = 2**63 - 1
# What providers call reasoning tokens in `details`. Newer versions of pydantic-ai have a field for them too.
_REASONING = ("reasoning_tokens", "thoughts_tokens", "thinking_tokens", "output_reasoning_tokens")


def read_usage(used: RequestUsage) -> Usage:
    """Return the tokens and the cost of a response."""
    details = used.details if isinstance(used.details, dict) else {}
    return Usage(
        input=to_count(used.input_tokens),
        output=to_count(used.output_tokens),
        cache_read=to_count(used.cache_read_tokens),
        cache_write=to_count(used.cache_write_tokens),
        reasoning=max(to_count(used.output_reasoning_tokens), *map(to_count, map(details.get, _REASONING)))
        if details
        else to_count(used.output_reasoning_tokens),
        cache_write_1h=to_count(used.cache_write_1h_tokens),
        cost_nano_usd=_to_nano_usd(used.cost),
    )


def estimate_usage(messages: Sequence[ModelMessage], output_chars: int) -> Usage:
    """Return an estimate for a request that was cut off before the provider reported its usage."""
    # Each request of the history has its instructions, of which the last ones are sent.
    instructions = getattr(messages[-1], "instructions", None) or "" if messages else ""
    chars = len(instructions) + sum(_count_chars(part) for message in messages for part in message.parts)
    return Usage(
        input=_tokens(chars),
        output=_tokens(output_chars),
        source="estimated",
    )


def to_count(value: object) -> int:
    """Return a number of tokens; a provider may send a float, a text or 2^70 (issue 12, case A11)."""
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


def _tokens(chars: int) -> int:
    return -(-chars // _CHARS_PER_TOKEN)


def _to_nano_usd(cost: object) -> int | None:
    if not isinstance(cost, Decimal | int | float) or isinstance(cost, bool) or not math.isfinite(cost):
        return None
    nano = (Decimal(str(cost)) * _NANO).to_integral_value(ROUND_HALF_EVEN)
    return min(max(int(nano), 0), _LARGEST)


def _count_chars(part: Any) -> int:
    if isinstance(part, BaseToolCallPart):
        return len(part.args_as_json_str())
    if isinstance(part, BaseToolReturnPart):
        return len(part.model_response_str())
    content = getattr(part, "content", "")
    # Images and files are left out: how many tokens they cost depends on the model.
    return sum(
        len(piece) for piece in ([content] if isinstance(content, str) else content or ()) if isinstance(piece, str)
    )
