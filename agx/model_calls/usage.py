"""Tokens and cost of a model response, as pydantic-ai reports them, or estimated where a request was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_ai.messages import BaseToolCallPart, BaseToolReturnPart, ModelMessage
from pydantic_ai.usage import RequestUsage

from ..facts.schema import Usage
from ..facts.usage import convert_usage

_CHARS_PER_TOKEN = 4  # a rule of thumb; what is counted with it is marked as estimated


def read_usage(used: RequestUsage) -> Usage:
    """Return the tokens and the cost of a response."""
    return convert_usage(lambda name: getattr(used, name, None))


def estimate_usage(messages: Sequence[ModelMessage], output_chars: int, more_chars: int = 0) -> Usage:
    """Return an estimate for a request that was cut off before the provider reported its usage.

    Args:
        more_chars: that were sent beside the messages.
    """
    # Each request of the history has its instructions, of which the last ones are sent.
    instructions = getattr(messages[-1], "instructions", None) or "" if messages else ""
    chars = more_chars + len(instructions) + sum(_count_chars(part) for message in messages for part in message.parts)
    return Usage(
        input=_tokens(chars),
        output=_tokens(output_chars),
        source="estimated",
    )


def _tokens(chars: int) -> int:
    return -(-chars // _CHARS_PER_TOKEN)


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
