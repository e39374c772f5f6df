"""The prompt of a chat front end's message, which is untrusted input in the format of its protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pydantic import ValidationError
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelRequest, UserContent, UserPromptPart, sanitize_messages

from ..errors import REQUEST_UNREADABLE
from .route import RefusedError, describe_fields
from .turns import Prompt


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Turn what a protocol's adapter, or `prompt_of()`, finds wrong with a message into 400."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, UserError, UserWarning) as error:
        # It warns of what it drops: where warnings are errors, such a message is refused.
        detail = f"The last message can't be read: {_describe(error)}"
        raise RefusedError(REQUEST_UNREADABLE, detail, status=400) from error


def prompt_of(loaded: Sequence[ModelMessage]) -> Prompt:
    """Return what the user says; what a browser must not decide (system prompts, uploads by reference) is dropped.

    Raises:
        ValueError: nothing is left.
    """
    asked = [part for message in loaded for part in message.parts if isinstance(part, UserPromptPart)]
    said: list[UserContent] = []
    for message in sanitize_messages([ModelRequest(parts=asked)]):
        for part in message.parts:
            if isinstance(part, UserPromptPart):
                said += [part.content] if isinstance(part.content, str) else part.content
    if not any(said):
        raise ValueError("it says nothing")
    return said[0] if len(said) == 1 and isinstance(said[0], str) else said


def _describe(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_fields(error.errors())
    return str(error)
