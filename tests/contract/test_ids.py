"""Ids: what none can be raises a ValueError or TypeError before Redis is touched (contract, section 3)."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import ScopeDeps, scripted

import agx
from agx.redis import keys
from agx.testing import MemorySession

# The contract's own words, not the code's.
ALLOWED = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.@=+|~-"

WRONG: list[Any] = [
    *(
        "",
        "a:b",
        ":",
        "a*",
        "a?",
        "[a]",
        "a b",
        " a",
        "a\n",
        "\na",
        "a\x00",
        "\x7f",
        "a/b",
        "a\\b",
        "{a}",
        "é",
        "\uff41",
    ),
    *("٣", "\ud800", "a" * 201, "%2e", "a'b", 'a"b', "#", "$", "a,b", "<", "🙂"),
    *(True, False, None, 1.0, float("nan"), b"a", bytearray(b"a"), ("a",), ["a"], object()),
]


@pytest.fixture
async def untouchable() -> AsyncGenerator[None, None]:
    """agx on an address where nobody answers: a call that gets so far raises something else, and later."""
    async with Redis(host="127.0.0.1", port=1) as client:
        agx.configure(agx.Config(client))
        yield
        await agx.aclose()


async def _run(scope: Any, user: Any, session: Any) -> None:
    class Scoped(ScopeDeps):
        def get_scope_id(self) -> Any:
            return scope

    await agx.run(
        MemorySession(id="s"), Agent(scripted(["never"])), "hi", deps=Scoped(user_id=user, session_id=session)
    )


async def _observe(scope: Any, user: Any, session: Any) -> None:
    capability = agx.AgxCapability(scope_id=scope, user_id=user, session_id=session)
    await Agent(scripted(["never"]), capabilities=[capability]).run("hi")


async def _first(events: AsyncGenerator[Any, None]) -> None:
    async with contextlib.aclosing(events):
        await anext(events)


CALLS: dict[str, Callable[[Any, Any, Any], Awaitable[object]]] = {
    "run": _run,
    "capability": _observe,
    "start": agx.start,
    "stop": agx.stop,
    "add": lambda *ids: agx.add(*ids, type="info", origin="mine"),
    "is_live": agx.is_live,
    "cancel": agx.cancel,
    "listen": lambda *ids: _first(agx.listen(*ids)),
    "sse": lambda *ids: _first(agx.sse(*ids)),
    "q": lambda *ids: _first(agx.q(*ids[:2])),
    "redis session": lambda *ids: agx.RedisSession(*ids).load(),
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["scope", "user", "session"])
@pytest.mark.parametrize("call", CALLS)
async def test_every_call_refuses_every_wrong_id(untouchable: None, call: str, place: int) -> None:
    if call == "q" and place == 2:
        place = 1
    for wrong in WRONG:
        ids: list[Any] = [1, "user@example.com", "s"]
        ids[place] = wrong
        if call == "capability" and wrong is None:
            continue  # there it means that none was given
        with pytest.raises((ValueError, TypeError)) as caught:
            async with asyncio.timeout(10):
                await CALLS[call](*ids)
        assert not isinstance(caught.value, UnicodeError)
        assert ("scope_id", "user_id", "session_id")[place] in str(caught.value)


@given(st.text(st.characters(exclude_categories=())) | st.text(ALLOWED, max_size=220))
def test_a_text_is_an_id_exactly_if_the_whole_of_it_matches(text: str) -> None:
    good = 1 <= len(text) <= 200 and set(text) <= set(ALLOWED)
    if good:
        session = keys.SessionKeys.of("agx", text, text, text)
        assert session.stream.split(":") == ["agx", text, text, text]
        assert keys.parse_lease_member("agx", session.lease_member("run")) == (session, "run")
    else:
        with pytest.raises(ValueError, match=re.escape("[A-Za-z0-9_.@=+|~-]{1,200}")):
            keys.SessionKeys.of("agx", 1, 1, text)


@given(st.integers())
def test_every_int_is_an_id(number: int) -> None:
    if len(str(number)) <= 200:
        assert keys.check_id(number, "scope_id") == str(number)


@given(
    st.none() | st.booleans() | st.floats() | st.binary() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())
)
def test_nothing_else_is_an_id(value: Any) -> None:
    with pytest.raises(TypeError, match="must be an int or a str"):
        keys.check_id(value, "scope_id")


def test_an_int_and_its_digits_are_one_id() -> None:
    assert keys.SessionKeys.of("agx", 1, 2, 3) == keys.SessionKeys.of("agx", "1", "2", "3")


def test_a_huge_int_is_refused_like_a_long_text() -> None:
    with pytest.raises(ValueError):
        keys.check_id(10**200, "scope_id")
    with pytest.raises(ValueError):
        keys.check_id(10**5_000, "scope_id")


@pytest.mark.parametrize("prefix", ["", " ", "a b", "a*", "{a}", "a\n", "é", None, 1, b"agx"])
def test_a_wrong_prefix_is_refused_at_once(prefix: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="key_prefix"):
        agx.Config(Redis(), key_prefix=prefix)


async def test_no_tenants_key_meets_the_runtimes_own(configured: Redis) -> None:
    """Scopes and users with the oddest ids there are; each sees its own only."""
    ids = ["0", "queue", "leases.0", "-", "|", "a=b", "live", "msgs"]
    for scope in ids:
        await agx.start(scope, "queue", "live")
        await agx.add(scope, "queue", "live", type="info", origin="mine", body={"scope": scope})
    for scope in ids:
        assert [found async for found in agx.q(scope, "queue")] == [(scope, "queue", "live")]
        await agx.stop(scope, "queue", "live")
        events = [event["body"] async for event in agx.listen(scope, "queue", "live", serialize=False)]
        assert [body["scope"] for body in events if "scope" in body] == [scope]
