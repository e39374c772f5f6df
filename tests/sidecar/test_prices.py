"""Prices agree with genai-prices to the nano-dollar."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN

import pytest
from genai_prices import Usage as PricedUsage
from genai_prices import calc_price
from hypothesis import given
from hypothesis import strategies as st
from support.made_facts import T0, call, usage

from agx_sidecar.metrics.prices import Prices

MODELS = [
    ("openai", "gpt-4o-mini"),
    ("openai", "gpt-5"),
    ("anthropic", "claude-sonnet-4-5"),
    ("google-gla", "gemini-2.5-pro"),  # dearer above 200,000 input tokens
    ("gcp.gemini", "gemini-2.5-flash"),
    ("deepseek", "deepseek-chat"),  # cheaper at night
    ("groq", "llama-3.3-70b-versatile"),
    ("aws.bedrock", "anthropic.claude-3-5-sonnet-20240620-v1:0"),
    ("azure.ai.openai", "gpt-4o"),
]


@pytest.mark.parametrize(("provider", "model"), MODELS)
@given(
    tokens=st.tuples(*[st.integers(0, 300_000)] * 4),
    reasoning=st.integers(0, 1_000),
    hour=st.integers(0, 23),
)
def test_prices_are_those_of_genai_prices(
    provider: str, model: str, tokens: tuple[int, int, int, int], reasoning: int, hour: int
) -> None:
    plain, read, write, output = tokens
    used = usage(input=plain + read + write, output=output, cache_read=read, cache_write=write, reasoning=reasoning)
    start_ns = T0 + hour * 3_600_000_000_000
    price = calc_price(
        PricedUsage(input_tokens=used.input, output_tokens=output, cache_read_tokens=read, cache_write_tokens=write),
        model,
        provider_id=provider,
        genai_request_timestamp=datetime.fromtimestamp(start_ns / 1e9, UTC),
    )
    expected = int((price.total_price * 10**9).to_integral_value(ROUND_HALF_EVEN))
    asked = call(provider=provider, request_model=model, response_model=None, usage=used, start_ns=start_ns)
    assert Prices().nano_dollars(asked) == expected


def test_the_model_that_answered_is_priced_before_the_one_asked_for() -> None:
    prices = Prices()
    routed = call(request_model="gpt-4o-mini", response_model="gpt-4o")
    assert prices.nano_dollars(routed) == prices.nano_dollars(call(request_model="gpt-4o", response_model=None))
    unknown = call(request_model="gpt-4o-mini", response_model="our-own-tune")
    assert prices.nano_dollars(unknown) == prices.nano_dollars(call(response_model=None))


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "our-own"), ("our-gateway", "gpt-4o"), ("", ""), ("test", "test")]
)
def test_what_is_not_known_has_no_price(provider: str, model: str) -> None:
    assert Prices().nano_dollars(call(provider=provider, request_model=model, response_model=None)) is None


def test_cached_tokens_reported_beside_the_input_are_priced_too() -> None:
    beside = call(usage=usage(input=10, cache_read=300, cache_write=0, output=0))
    whole = call(usage=usage(input=300, cache_read=300, cache_write=0, output=0))
    assert Prices().nano_dollars(beside) == Prices().nano_dollars(whole)
