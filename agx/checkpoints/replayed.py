"""Returns a recorded tool result to pydantic-ai, or raises what the tool had raised."""

from __future__ import annotations

from typing import Any

from pydantic_ai.exceptions import ToolFailedError, ToolRetryError
from pydantic_ai.messages import ToolReturn as UpstreamToolReturn

from .codec import ToolReturn


def replay_return(recorded: ToolReturn) -> Any:
    """Return what the tool returned.

    Raises:
        ToolRetryError: the tool had asked the model to try again.
        ToolFailedError: the tool had reported a failure to the model.
    """
    part = recorded.part
    if part.outcome == "retried":
        raise ToolRetryError(part)
    if part.outcome == "failed":
        raise ToolFailedError(part)
    return UpstreamToolReturn(part.content, content=recorded.content, metadata=part.metadata)
