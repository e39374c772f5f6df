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
    """Return the content of the user's message.

    What a browser must not decide (system prompts, uploads by reference) is dropped.

    Raises:
        ValueError: nothing is left.
    """
    asked = [part for message in loaded for part in message.parts if isinstance(part, UserPromptPart)]
    content: list[UserContent] = []
    for message in sanitize_messages([ModelRequest(parts=asked)]):
        for part in message.parts:
            if isinstance(part, UserPromptPart):
                content += [part.content] if isinstance(part.content, str) else part.content
    if not any(content):
        raise ValueError("it has no content")
    return content[0] if len(content) == 1 and isinstance(content[0], str) else content


def _describe(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_fields(error.errors())
    return str(error)
