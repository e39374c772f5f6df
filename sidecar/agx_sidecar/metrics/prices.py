"""Prices the usage of a model response in nano-dollars, from genai-prices; unknown models have no price."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal

from genai_prices import Usage as PricedUsage
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

from agx.facts.schema import ModelCall, Usage

from .instruments import NANO

_MEGA = 1_000_000


@dataclass(frozen=True, slots=True)
class _Rates:
    """Dollars per million tokens of a model whose prices depend on nothing else."""

    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write: Decimal


@dataclass(frozen=True, slots=True)
class _Known:
    provider: Provider
    model: ModelInfo
    rates: _Rates | None  # None: tiers or times matter, so every response is priced by genai-prices itself


class Prices:
    """Looks up each model once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Known | None] = {}

    def nano_dollars(self, call: ModelCall) -> int | None:
        """Return the price of a model response, rounded to the nano-dollar, or None where there is none.

        The model that answered is looked up before the one that was asked for.
        """
        known = self._find(call.provider, call.response_model) if call.response_model else None
        known = known or self._find(call.provider, call.request_model)
        if known is None:
            return None
        usage = _consistent(call.usage)
        if known.rates is not None:
            dollars_mega = _linear(known.rates, usage)
            return int((dollars_mega * (NANO // _MEGA)).to_integral_value(ROUND_HALF_EVEN))
        try:
            when = datetime.fromtimestamp(call.start_ns / NANO, UTC)
            price = known.model.calc_price(_priced(usage), known.provider, genai_request_timestamp=when)
        except (LookupError, ValueError, OverflowError, OSError):  # the last three: no such time
            return None
        return int((price.total_price * NANO).to_integral_value(ROUND_HALF_EVEN))

    def _find(self, provider: str, model: str) -> _Known | None:
        key = (provider, model)
        if key not in self._known:
            if len(self._known) >= 10_000:  # names come from outside
                self._known.clear()
            self._known[key] = _look_up(provider, model)
        return self._known[key]


def _look_up(provider_id: str, model_ref: str) -> _Known | None:
    try:
        provider, model = get_snapshot().find_provider_model(model_ref, None, provider_id, None)
    except LookupError:
        return None
    prices = model.prices
    if not isinstance(prices, ModelPrice) or any(isinstance(price, TieredPrices) for price in vars(prices).values()):
        return _Known(provider, model, None)
    try:
        return _Known(provider, model, _measure(provider, model))
    except (LookupError, ValueError):
        return _Known(provider, model, None)


def _measure(provider: Provider, model: ModelInfo) -> _Rates:
    """Ask genai-prices for a million tokens of each type, so that its own rules decide what each costs."""

    def rate(**tokens: int) -> Decimal:
        return model.calc_price(PricedUsage(**tokens), provider).total_price

    return _Rates(
        input=rate(input_tokens=_MEGA),
        output=rate(output_tokens=_MEGA),
        cache_read=rate(input_tokens=_MEGA, cache_read_tokens=_MEGA),
        cache_write=rate(input_tokens=_MEGA, cache_write_tokens=_MEGA),
    )


def _linear(rates: _Rates, usage: Usage) -> Decimal:
    plain = usage.input - usage.cache_read - usage.cache_write
    return (
        plain * rates.input
        + usage.cache_read * rates.cache_read
        + usage.cache_write * rates.cache_write
        + usage.output * rates.output
    )


def _priced(usage: Usage) -> PricedUsage:
    return PricedUsage(
        input_tokens=usage.input,
        output_tokens=usage.output,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write,
    )


def _consistent(usage: Usage) -> Usage:
    """Return usage whose parts fit into their wholes; some providers report cached tokens beside the input."""
    cached = usage.cache_read + usage.cache_write
    if usage.input >= cached:
        return usage
    return Usage(cached, usage.output, usage.cache_read, usage.cache_write, usage.reasoning, usage.source)
