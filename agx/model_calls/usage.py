"""Tokens and cost of a model response, as pydantic-ai reports them."""

from __future__ import annotations

from pydantic_ai.usage import RequestUsage

from ..facts.schema import Usage
from ..facts.usage import convert_usage


def read_usage(used: RequestUsage) -> Usage:
    """Return the tokens and the cost of a response."""
    return convert_usage(lambda name: getattr(used, name, None))
