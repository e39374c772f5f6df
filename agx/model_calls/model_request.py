"""A model request under way: its chunks, its attempts, its usage and its finish, as the node's fact states them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pydantic_ai.exceptions
from pydantic_ai.exceptions import FallbackExceptionGroup
from pydantic_ai.messages import ModelRequestAttempt, ModelResponse
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.wrapper import WrapperModel

from ..checkpoints.text_size import count_chars
from ..facts.schema import CHUNK_BUCKETS, ModelCall, Outcome, Usage
from ..facts.usage import estimate_usage, to_text
from .private_api import carried_attempts
from .usage import read_usage

# Where pydantic-ai keeps the provider's own finish reason in `provider_details`. Its normalised one is `stop` even for
# a stream that was cut short, so only the raw one shows that.
_KEEPS_RAW_FINISH = tuple(
    f"pydantic_ai.models.{name}"
    for name in ("anthropic", "bedrock", "cohere", "google", "groq", "huggingface", "mistral", "openai", "openrouter")
)
_REJECTED = "rejected"  # the error type of a response that a fallback or a hook rejected


@dataclass(slots=True)
class ModelRequest:
    """A model request, from the moment it leaves until a model answered it or all attempts failed."""

    context: ModelRequestContext  # its model is the one of the latest attempt
    start_ns: int = field(default_factory=time.time_ns)
    end_ns: int | None = None
    chars: int = 0
    response: ModelResponse | None = None
    _started: int = field(default_factory=time.perf_counter_ns)
    _first_chunk_ns: int | None = None
    _last_chunk: int = 0
    _counts: list[int] = field(default_factory=lambda: [0] * (len(CHUNK_BUCKETS) + 1))
    _sum_ns: int = 0

    @property
    def stream(self) -> bool:
        """Whether the response arrives in chunks."""
        return self.context.streaming

    def complete(self, response: ModelResponse) -> None:
        """The response is complete."""
        self.response = response
        self.end_ns = time.time_ns()

    def chunk(self, chars: int) -> None:
        """A chunk has arrived; on the token path."""
        self.chars += chars
        now = time.perf_counter_ns()
        if self._first_chunk_ns is None:
            self._first_chunk_ns = now - self._started
        else:
            gap = now - self._last_chunk
            self._counts[bisect_left(CHUNK_BUCKETS, gap / 1e9)] += 1
            self._sum_ns += gap
        self._last_chunk = now

    def describe(self, outcome: Outcome, error: BaseException | None) -> tuple[ModelCall, tuple[ModelCall, ...]]:
        """Return the node's own call, the last one sent, and the failed attempts before it.

        Each request sent is one of them, under the name of the model that it was sent to (issue 12, case A6).
        """
        failed = _failed_attempts(self.response, error)
        if self.response is None and isinstance(error, FallbackExceptionGroup) and failed:
            *before, last = failed
            return last, tuple(before)
        response = self.response
        model = _find_answering(self.context.model, response, failed)
        start_ns = max([self.start_ns, *(attempt.end_ns for attempt in failed)])
        first_chunk_ns = self._first_chunk_ns
        call = ModelCall(
            provider=to_text(model.system) or "",
            request_model=to_text(model.model_name) or "",
            response_model=None if response is None else to_text(response.model_name),
            response_id=None if response is None else to_text(response.provider_response_id),
            stream=self.stream,
            finish_reason=None if response is None else to_text(response.finish_reason),
            finish_reason_missing=outcome == "completed" and response is not None and _lacks_finish(model, response),
            first_chunk_ns=None if first_chunk_ns is None else max(first_chunk_ns - (start_ns - self.start_ns), 0),
            chunk_counts=tuple(self._counts) if any(self._counts) else (),
            chunk_sum_ns=self._sum_ns,
            usage=self._usage(outcome),
            start_ns=start_ns,
            end_ns=max(self.end_ns or time.time_ns(), start_ns),
        )
        return call, tuple(failed)

    def _usage(self, outcome: Outcome) -> Usage:
        if self.response is not None and self.response.usage.has_values():
            return read_usage(self.response.usage)
        if self.chars or outcome == "cancelled":
            # The provider bills the prompt of a request that it had begun to answer.
            return estimate_usage(count_chars(self.context.messages), self.chars)
        return Usage(source="missing")


def _failed_attempts(response: ModelResponse | None, error: BaseException | None) -> list[ModelCall]:
    """Return the attempts that pydantic-ai moved on from, in their order."""
    attempts: Sequence[ModelRequestAttempt] = ()
    if response is not None:
        attempts = response.failed_attempts or ()
    elif isinstance(error, FallbackExceptionGroup):
        attempts = error.attempts
    elif error is not None:
        attempts = carried_attempts(error)
    # A nested fallback model stands in the list once more, as a whole, after its own attempts.
    return [
        _describe_attempt(attempt) for attempt in attempts if not to_text(attempt.model_name).startswith("fallback:")
    ]


def _describe_attempt(attempt: ModelRequestAttempt) -> ModelCall:
    start_ns = int(attempt.timestamp.timestamp() * 1e9)
    return ModelCall(
        provider=to_text(attempt.provider_name) or "",
        request_model=to_text(attempt.model_name),
        usage=Usage(source="missing") if attempt.usage is None else read_usage(attempt.usage),
        start_ns=start_ns,
        end_ns=start_ns + int(attempt.duration / timedelta(microseconds=1)) * 1_000,
        error_type=_REJECTED if attempt.outcome == "rejected" else _error_type(attempt.error),
    )


def _error_type(description: str | None) -> str | None:
    """Return the type in `'ExceptionType: message'`; the message may quote the prompt."""
    if description is None:
        return None
    name = description.partition(":")[0]
    return f"pydantic_ai.exceptions.{name}" if hasattr(pydantic_ai.exceptions, name) else name


def _find_answering(model: Model[Any], response: ModelResponse | None, failed: Sequence[ModelCall]) -> Model[Any]:
    """Return the model that a request was last sent to; a fallback model does not name it."""
    leaves = list(_unwrap(model))
    if response is not None:
        for leaf in leaves:
            if (leaf.model_name, leaf.system) == (response.model_name, response.provider_name):
                return leaf
    tried = {(attempt.request_model, attempt.provider) for attempt in failed}
    untried = [leaf for leaf in leaves if (leaf.model_name, leaf.system) not in tried] or leaves
    if response is not None:
        for leaf in untried:
            if leaf.system == response.provider_name:
                return leaf
    return untried[0]


def _unwrap(model: Model[Any]) -> Iterator[Model[Any]]:
    """Yield the models that would answer."""
    if isinstance(model, WrapperModel):
        yield from _unwrap(model.wrapped)
    elif isinstance(model, FallbackModel):
        for inner in model.models:
            yield from _unwrap(inner)
    else:
        yield model


def _lacks_finish(model: Model[Any], response: ModelResponse) -> bool:
    return "finish_reason" not in (response.provider_details or {}) and _keeps_raw_finish(type(model))


@lru_cache(maxsize=1_000)
def _keeps_raw_finish(kind: type) -> bool:
    return any(cls.__module__.startswith(_KEEPS_RAW_FINISH) for cls in kind.__mro__)
