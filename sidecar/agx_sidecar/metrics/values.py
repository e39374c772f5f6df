"""What a metric takes from a fact: durations in ns, tokens, and prices in nano-dollars.

pydantic-ai prices each response itself, with the gateway's own figure or the service tier where there is one, so the
fact's `cost_nano_usd` comes first. What has none, such as a cancelled request or a fact of an older service, is priced
here as pydantic-ai does it. genai-prices takes half a millisecond for one response: equal ones are priced once.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from agx.facts.schema import ModelCall, NodeEnded, RunEnded, RunFeedback, RunResumed, ToolEnded

from .table import Value

if TYPE_CHECKING:
    from genai_prices import Usage as PricedUsage

_NANO = 1_000_000_000
_MINUTE_NS = 60 * _NANO
_CACHE_SIZE = 16_384

DISJOINT_TOKENS: Mapping[str, Value] = {
    "input": lambda fact: fact.model.usage.input - fact.model.usage.cache_read - fact.model.usage.cache_write,
    "output": lambda fact: fact.model.usage.output - fact.model.usage.reasoning,
    "cache_read": attrgetter("model.usage.cache_read"),
    "cache_write": attrgetter("model.usage.cache_write"),
    "reasoning": attrgetter("model.usage.reasoning"),
}
WHOLE_TOKENS: Mapping[str, Value] = {
    "input": attrgetter("model.usage.input"),
    "output": attrgetter("model.usage.output"),
}


def duration(fact: RunEnded | NodeEnded | ToolEnded) -> int:
    """Return how long a run, a node or a tool call took."""
    return fact.end_ns - fact.start_ns


def request_duration(fact: Any) -> int:
    """Return how long a node's model request took."""
    return int(fact.model.end_ns - fact.model.start_ns)


def recovery(fact: RunResumed) -> int:
    """Return how long a run had no process, as far as that was seen."""
    return fact.at_ns - fact.last_ns


def score(fact: RunFeedback) -> int:
    """Return a score in billionths; one that is no number, or beyond all measure, counts as 0."""
    return round(fact.value * _NANO) if 0 <= fact.value < _NANO else 0


def cancel_latency(fact: RunEnded) -> int | None:
    """Return the server's time from the mark of `cancel()` to the run's end; None where nobody called it."""
    if fact.cancel_ms is None or fact.end_ms is None:
        return None
    return (fact.end_ms - fact.cancel_ms) * 1_000_000


def cost(fact: Any) -> int | None:
    """Return the price of the response of a node that has one."""
    return nano_dollars(fact.model)


def unpriced(fact: Any) -> int | None:
    """Return 1 for a response whose tokens have no known price."""
    usage = fact.model.usage
    return 1 if (usage.input or usage.output) and nano_dollars(fact.model) is None else None


def nano_dollars(call: ModelCall) -> int | None:
    """Return the price of a model response, rounded to the nano-dollar, or None where there is none.

    The model that answered is looked up before the one that was asked for.
    """
    usage = call.usage
    if usage.cost_nano_usd is not None:
        return usage.cost_nano_usd
    return _price(
        call.provider,
        call.response_model,
        call.request_model,
        (usage.input, usage.output, usage.cache_read, usage.cache_write, usage.cache_write_1h),
        call.start_ns // _MINUTE_NS,
    )


@lru_cache(maxsize=_CACHE_SIZE)
def _price(
    provider: str, response_model: str | None, request_model: str, tokens: tuple[int, ...], minute: int
) -> int | None:
    from genai_prices import calc_price  # noqa: PLC0415 - a tenth of the start, and most responses have a price

    when = datetime.fromtimestamp(minute * 60, UTC)
    for model in (response_model, request_model):
        if not model:
            continue
        try:
            price = calc_price(_consistent(*tokens), model, provider_id=provider, genai_request_timestamp=when)
        except LookupError:
            continue
        except ValueError:  # usage that can't be priced, such as a negative number of tokens
            return None
        return int((price.total_price * _NANO).to_integral_value(ROUND_HALF_EVEN))
    return None


def _consistent(input_: int, output: int, cache_read: int, cache_write: int, cache_write_1h: int) -> PricedUsage:
    """Return usage whose parts fit into their wholes; some providers report cached tokens beside the input."""
    from genai_prices import Usage  # noqa: PLC0415

    cache_write = max(cache_write, cache_write_1h)
    return Usage(
        input_tokens=max(input_, cache_read + cache_write),
        output_tokens=output,
        cache_read_tokens=cache_read,
        cache_write_tokens=cache_write,
        cache_write_1h_tokens=cache_write_1h,
    )
