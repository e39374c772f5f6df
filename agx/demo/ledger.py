"""What really ran, from what `agx.run()` returned or raised, the saved messages and the tools themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.usage import RequestUsage

from ..facts.schema import Outcome, ToolOutcome

TokenType = Literal["input", "output", "cache_read", "cache_write", "reasoning"]


@dataclass(frozen=True, slots=True)
class Ran:
    """One run that is over. `seconds` is what its caller waited, so never less than what agx measured."""

    scope: str
    user: str
    session: str
    agent: str
    outcome: Outcome
    reason: str | None
    error_type: str | None
    tokens: Counter[TokenType]
    all_reported: (
        bool  # False if an answer came without usage, as one that was cut does: then tokens are at least these
    )
    tool_calls: Counter[tuple[str, ToolOutcome]]
    model_requests: int | None  # None with a real model, which nobody else counts
    seconds: float


@dataclass(slots=True)
class Ledger:
    """All runs so far."""

    ran: list[Ran] = field(default_factory=list)

    def outcomes(self) -> Counter[Outcome]:
        return Counter(run.outcome for run in self.ran)

    def tokens(self) -> Counter[TokenType]:
        return sum((run.tokens for run in self.ran), Counter())


def count_tokens(messages: Iterable[ModelMessage]) -> Counter[TokenType]:
    """Return the tokens of a conversation by disjoint type: providers report cached and reasoning ones as part of
    input and output, here each counts once.
    """
    total: Counter[TokenType] = Counter()
    for message in messages:
        if isinstance(message, ModelResponse):
            total += _disjoint(message.usage)
    return total


def has_all_usage(messages: Iterable[ModelMessage]) -> bool:
    """Return whether every answer came with its usage; one that never began has none to come with."""
    answers = [message for message in messages if isinstance(message, ModelResponse) and message.parts]
    return all(answer.usage.has_values() for answer in answers)


def _disjoint(usage: RequestUsage) -> Counter[TokenType]:
    reasoning = usage.details.get("reasoning_tokens", 0)
    return Counter(
        {
            "input": usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens,
            "output": usage.output_tokens - reasoning,
            "cache_read": usage.cache_read_tokens,
            "cache_write": usage.cache_write_tokens,
            "reasoning": reasoning,
        }
    )
