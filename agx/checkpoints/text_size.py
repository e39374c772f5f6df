"""Counts the characters of a conversation, from which tokens are estimated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_ai.messages import BaseToolCallPart, BaseToolReturnPart, ModelMessage


def count_chars(messages: Sequence[ModelMessage]) -> int:
    """Return the number of characters of a conversation, with the instructions that are sent with it."""
    return count_instructions(messages) + sum(map(count_message, messages))


def count_instructions(messages: Sequence[ModelMessage]) -> int:
    """Return the number of characters of the instructions that are sent: those of the last request that has some."""
    return len(next((text for message in reversed(messages) if (text := getattr(message, "instructions", None))), ""))


def count_message(message: ModelMessage) -> int:
    """Return the number of characters of one message, without its instructions."""
    return sum(map(_count_part, message.parts))


def _count_part(part: Any) -> int:
    if isinstance(part, BaseToolCallPart):
        return len(part.args_as_json_str())
    if isinstance(part, BaseToolReturnPart):
        return len(part.model_response_str())
    content = getattr(part, "content", "")
    # Images and files are left out: how many tokens they cost depends on the model.
    return sum(
        len(piece) for piece in ([content] if isinstance(content, str) else content or ()) if isinstance(piece, str)
    )
