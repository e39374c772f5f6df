"""The runs that have ended, as their caller saw them: result or exception, saved messages, tool calls."""

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
class FinishedRun:
    """One run that has ended.

    Args:
        all_reported: False if an answer came without usage, as a cancelled one does: `tokens` are a lower bound.
        model_requests: None with a real model: only agx counts its requests.
        seconds: from its start to its end, or until its process was killed if that ended it.
        resumes: how often another process resumed it.
        note: what happened to its process.
    """

    scope: str
    user: str
    session: str
    agent: str
    outcome: Outcome
    reason: str | None
    error_type: str | None
    tokens: Counter[TokenType]
    all_reported: bool
    tool_calls: Counter[tuple[str, ToolOutcome]]
    model_requests: int | None
    seconds: float
    resumes: int = 0
    note: str = ""


@dataclass(slots=True)
class FinishedRuns:
    """All runs that have ended so far."""

    runs: list[FinishedRun] = field(default_factory=list)

    def outcomes(self) -> Counter[Outcome]:
        return Counter(run.outcome for run in self.runs)

    def tokens(self) -> Counter[TokenType]:
        return sum((run.tokens for run in self.runs), Counter())


def count_tokens(messages: Iterable[ModelMessage]) -> Counter[TokenType]:
    """Return the tokens of a conversation by disjoint type: providers report cached and reasoning ones as part of
    input and output, here each counts once.
    """
    total: Counter[TokenType] = Counter()
    for message in messages:
        if isinstance(message, ModelResponse):
            total += _disjoint(message.usage)
    return total


def has_all_usage(messages: Iterable[ModelMessage], outcome: Outcome, requests: int | None) -> bool:
    """Return whether the usage of every request was reported.

    An answer without parts needs none. A request that was cancelled before its answer began has no answer, or one
    without parts, and agx estimates its usage; `requests` is how many were sent, None if that is not known.
    """
    answers = [message for message in messages if isinstance(message, ModelResponse)]
    if outcome == "cancelled":
        return requests == len(answers) and all(answer.usage.has_values() for answer in answers)
    return all(answer.usage.has_values() for answer in answers if answer.parts)


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
