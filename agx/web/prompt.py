"""A message as a chat front end submits it: untrusted, in its protocol's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastapi import HTTPException
from pydantic import ValidationError
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelRequest, UserContent, UserPromptPart, sanitize_messages

from .turns import Prompt


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Turn what a protocol's adapter, or `prompt_of()`, finds wrong with a message into 400."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, UserError, UserWarning) as error:
        # It warns of what it drops: where warnings are errors, such a message is refused.
        raise HTTPException(400, f"the last message can't be read: {_describe(error)}") from error


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
        # Without its input: that may be anything.
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
    return str(error)
