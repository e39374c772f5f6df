"""The server's clock as it is known here: between question and answer, and never before what the server marked."""

from __future__ import annotations

import time

import pytest

from agx.redis.clock import ServerClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [100_000_000_000]  # nanoseconds
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    return now


def test_the_answer_was_given_between_question_and_now(now: list[int]) -> None:
    clock = ServerClock()
    asked, now[0] = now[0], now[0] + 20_000_000
    clock.sync(5_000, asked)
    assert clock.now_ms() == 5_010
    now[0] += 1_500_000_000
    assert clock.now_ms() == 6_510


def test_a_mark_of_the_servers_is_not_in_the_future(now: list[int]) -> None:
    clock = ServerClock()
    clock.sync(5_000, now[0])
    clock.at_least(4_000)
    assert clock.now_ms() == 5_000
    clock.at_least(5_007)
    assert clock.now_ms() == 5_007
