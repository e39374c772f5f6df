"""A prompt as a chat front end submits it: untrusted, in its protocol's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import HTTPException
from pydantic import ValidationError
from pydantic_ai.messages import ModelMessage, ModelRequest, UserContent, UserPromptPart, sanitize_messages

from .runs import Prompt


def prompt_of(load: Callable[[], Sequence[ModelMessage]]) -> Prompt:
    """Return what the user says; what a browser must not decide (system prompts, uploads by reference) is dropped.

    Raises:
        HTTPException: 400, nothing is left, or `load` could not make anything of the message.
    """
    try:
        asked = [part for message in load() for part in message.parts if isinstance(part, UserPromptPart)]
        messages = sanitize_messages([ModelRequest(parts=asked)])
    except (ValueError, TypeError, AssertionError, UserWarning) as error:
        # It warns of what it drops: where warnings are errors, such a message is refused.
        raise HTTPException(400, f"the last message can't be read: {_describe(error)}") from error
    said: list[UserContent] = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, UserPromptPart):
                said += [part.content] if isinstance(part.content, str) else part.content
    if not any(said):
        raise HTTPException(400, "the last message says nothing")
    return said[0] if len(said) == 1 and isinstance(said[0], str) else said


def _describe(error: Exception) -> str:
    if isinstance(error, ValidationError):
        # Without its input: that may be anything.
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
    return str(error)
