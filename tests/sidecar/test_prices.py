"""Prices agree with genai-prices to the nano-dollar."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN

import pytest
from genai_prices import Usage as PricedUsage
from genai_prices import calc_price
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_ai.messages import ModelResponse
from pydantic_ai.usage import RequestUsage
from support.made_facts import T0, call, usage

from agx_sidecar.metrics.values import nano_dollars

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
@settings(max_examples=20)  # genai-prices takes half a millisecond, the machine's noise not counted
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
    assert nano_dollars(asked) == expected


def test_the_model_that_answered_is_priced_before_the_one_asked_for() -> None:
    routed = call(request_model="gpt-4o-mini", response_model="gpt-4o")
    assert nano_dollars(routed) == nano_dollars(call(request_model="gpt-4o", response_model=None))
    unknown = call(request_model="gpt-4o-mini", response_model="our-own-tune")
    assert nano_dollars(unknown) == nano_dollars(call(response_model=None))


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "our-own"), ("our-gateway", "gpt-4o"), ("", ""), ("test", "test")]
)
def test_what_is_not_known_has_no_price(provider: str, model: str) -> None:
    assert nano_dollars(call(provider=provider, request_model=model, response_model=None)) is None


def test_cached_tokens_reported_beside_the_input_are_priced_too() -> None:
    beside = call(usage=usage(input=10, cache_read=300, cache_write=0, output=0))
    whole = call(usage=usage(input=300, cache_read=300, cache_write=0, output=0))
    assert nano_dollars(beside) == nano_dollars(whole)


def test_one_hour_cache_writes_cost_what_upstream_says() -> None:
    used = RequestUsage(
        input_tokens=100_000, cache_write_tokens=100_000, cache_write_1h_tokens=100_000, output_tokens=10
    )
    upstream = ModelResponse(
        parts=[], usage=used, model_name="claude-sonnet-4-5", provider_name="anthropic", timestamp=datetime.now(UTC)
    ).cost()
    ours = usage(input=100_000, cache_read=0, cache_write=100_000, cache_write_1h=100_000, output=10, reasoning=0)
    asked = call(provider="anthropic", request_model="claude-sonnet-4-5", response_model=None, usage=ours)
    assert nano_dollars(asked) == 600_150_000 == upstream.total_price * 10**9


def test_a_cost_that_the_response_has_is_taken_also_for_an_unknown_model() -> None:
    priced = call(provider="our-gateway", request_model="ours", usage=usage(cost_nano_usd=123_456))
    assert nano_dollars(priced) == 123_456
    free = call(usage=usage(cost_nano_usd=0))
    assert nano_dollars(free) == 0


def test_usage_that_contradicts_itself_is_priced_as_its_parts() -> None:
    odd = call(usage=usage(input=10, cache_write=5, cache_write_1h=300, cache_read=0, output=0))
    whole = call(usage=usage(input=300, cache_write=300, cache_write_1h=300, cache_read=0, output=0))
    assert nano_dollars(odd) == nano_dollars(whole)


def test_negative_tokens_have_no_price_and_no_time_is_impossible() -> None:
    assert nano_dollars(call(usage=usage(output=-5))) is None
    for start_ns in (-(2**63), 2**63 - 1):
        assert nano_dollars(call(start_ns=start_ns)) is not None
