"""A model request of a dead process: its response as a checkpoint has it, or an estimate where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from pydantic import ValidationError
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse

from ..facts.schema import ModelCall
from ..facts.usage import to_text
from .usage import estimate_usage, read_usage


def describe_response(
    checkpoint: bytes | None,
    *,
    provider: str,
    model: str,
    conversation: Sequence[ModelMessage],
    prompt_chars: int = 0,
    chars: int,
    start_ns: int,
    end_ns: int,
) -> ModelCall:
    """Return the model call of a request that a dead process had sent.

    Args:
        checkpoint: of its `llm-end`; None where the request was under way.
        conversation: what it sent; the provider bills it, also where nobody received the response.
        prompt_chars: how many characters it sent beside these messages.
        chars: how many characters of the response were received.
    """
    response = None if checkpoint is None else _read_response(checkpoint)
    known = response is not None and response.usage.has_values()
    return ModelCall(
        provider=provider,
        request_model=model,
        response_model=None if response is None else to_text(response.model_name),
        response_id=None if response is None else to_text(response.provider_response_id),
        stream=True,
        finish_reason=None if response is None else to_text(response.finish_reason),
        usage=read_usage(response.usage)
        if response is not None and known
        else estimate_usage(conversation, chars, prompt_chars),
        start_ns=start_ns,
        end_ns=end_ns,
    )


def _read_response(checkpoint: bytes) -> ModelResponse | None:
    """Return the response that a checkpoint of `llm-end` has as its last message; None where it can't be read."""
    try:
        last = orjson.loads(checkpoint)["messages"][-1]
        (message,) = ModelMessagesTypeAdapter.validate_python([last])
    except (ValidationError, LookupError, TypeError, ValueError):
        return None
    return message if isinstance(message, ModelResponse) else None
