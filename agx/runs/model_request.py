"""A model request under way: its chunks, its usage and its finish, as the node's fact will tell them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai.messages import ModelResponse
from pydantic_ai.models import Model
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.wrapper import WrapperModel

from ..facts.schema import CHUNK_BUCKETS, ModelCall, Usage

_CHARS_PER_TOKEN = 4  # the rule of thumb for an answer that was cut off without usage, marked as estimated

# Where pydantic-ai keeps the provider's own finish reason in `provider_details`. Its normalised one says `stop` even
# for a stream that was cut short, so only the raw one tells.
_KEEPS_RAW_FINISH = {
    f"pydantic_ai.models.{name}"
    for name in ("anthropic", "bedrock", "cohere", "google", "groq", "huggingface", "mistral", "openai", "openrouter")
}


@dataclass(slots=True)
class ModelRequest:
    """A model request, from the moment it leaves."""

    model: Model[Any]
    stream: bool
    start_ns: int = field(default_factory=time.time_ns)
    end_ns: int | None = None
    chars: int = 0
    response: ModelResponse | None = None
    _started: int = field(default_factory=time.perf_counter_ns)
    _first_chunk_ns: int | None = None
    _last_chunk: int = 0
    _counts: list[int] = field(default_factory=lambda: [0] * (len(CHUNK_BUCKETS) + 1))
    _sum_ns: int = 0

    def answered(self, response: ModelResponse) -> None:
        """The response is whole."""
        self.response = response
        self.end_ns = time.time_ns()

    def chunk(self, chars: int) -> None:
        """A chunk has come; on the token path."""
        self.chars += chars
        now = time.perf_counter_ns()
        if self._first_chunk_ns is None:
            self._first_chunk_ns = now - self._started
        else:
            gap = now - self._last_chunk
            self._counts[bisect_left(CHUNK_BUCKETS, gap / 1e9)] += 1
            self._sum_ns += gap
        self._last_chunk = now

    def describe(self, *, completed: bool) -> ModelCall:
        """Return what the node's fact says of this request."""
        response = self.response
        return ModelCall(
            provider=self.model.system,
            request_model=self.model.model_name,
            response_model=None if response is None else response.model_name,
            response_id=None if response is None else response.provider_response_id,
            stream=self.stream,
            finish_reason=None if response is None else response.finish_reason,
            finish_reason_missing=completed and response is not None and self._lacks_finish(response),
            first_chunk_ns=self._first_chunk_ns,
            chunk_counts=tuple(self._counts) if any(self._counts) else (),
            chunk_sum_ns=self._sum_ns,
            usage=self._usage(),
            start_ns=self.start_ns,
            end_ns=self.end_ns or time.time_ns(),
        )

    def _lacks_finish(self, response: ModelResponse) -> bool:
        if "finish_reason" in (response.provider_details or {}):
            return False
        modules = {cls.__module__ for model in unwrap(self.model) for cls in type(model).__mro__}
        return any(module.startswith(tuple(_KEEPS_RAW_FINISH)) for module in modules)

    def _usage(self) -> Usage:
        if self.response is not None and self.response.usage.has_values():
            used = self.response.usage
            return Usage(
                input=used.input_tokens,
                output=used.output_tokens,
                cache_read=used.cache_read_tokens,
                cache_write=used.cache_write_tokens,
                reasoning=used.details.get("reasoning_tokens", 0),
            )
        if self.chars:
            return Usage(output=-(-self.chars // _CHARS_PER_TOKEN), source="estimated")
        return Usage(source="missing")


def unwrap(model: object) -> Iterator[object]:
    """Yield the models that would really answer."""
    if isinstance(model, WrapperModel):
        yield from unwrap(model.wrapped)
    elif isinstance(model, FallbackModel):
        for inner in model.models:
            yield from unwrap(inner)
    else:
        yield model
