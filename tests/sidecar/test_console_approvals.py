"""The console's tool calls that wait: who sees what of them, and what a decision does, and does not."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape

import httpx
import orjson
import pytest
from redis import Redis
from support.replica import PARTITIONS, PREFIX, Queue
from support.visitor import TOKEN, leave_call

from agx.facts.decoding import decode
from agx.facts.schema import FIELD, ApprovalDecided
from agx.redis import keys
from agx_sidecar.console.app import Console
from agx_sidecar.settings import read_settings

SESSION = keys.SessionKeys(PREFIX, "acme", "u1", "s1")
KEY = keys.approvals(PREFIX, keys.partition("acme", PARTITIONS))
FORM = {"scope": "acme", "user": "u1", "session": "s1", "call": "c1", "decision": "approve"}
URL = "http://console"


@asynccontextmanager
async def console(queue: Queue, mode: str = "full", content: str = "1") -> AsyncIterator[httpx.AsyncClient]:
    """A console's application and a visitor who is logged in and sends forms from its own pages."""
    address = queue.redis.connection_pool.connection_kwargs
    url = f"redis://{address['host']}:{address['port']}" if "host" in address else f"unix://{address['path']}"
    environment = {
        "AGX_REDIS_URL": url,
        "AGX_CONSOLE": mode,
        "AGX_CONSOLE_TOKEN": TOKEN,
        "AGX_CONSOLE_CONTENT": content,
    }
    settings = read_settings({**environment, "AGX_KEY_PREFIX": PREFIX})
    assert settings.console is not None
    app = Console(settings, settings.console).make_app()
    transport = httpx.ASGITransport(app, client=("10.0.0.7", 1))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=URL, headers={"Origin": URL}) as visitor,
    ):
        login = await visitor.post("/login", data={"token": TOKEN})
        visitor.cookies.set(*login.headers["set-cookie"].split(";")[0].split("=", 1))
        yield visitor


def leave(client: Redis, call_id: str = "c1", **fields: object) -> None:
    leave_call(client, SESSION, call_id, partitions=PARTITIONS, **fields)


def decided(client: Redis, call_id: str = "c1") -> dict[str, object] | None:
    raw = client.hget(KEY, f"d:acme:u1:s1:{call_id}")
    return None if raw is None else orjson.loads(raw)


def decisions(client: Redis) -> list[ApprovalDecided]:
    entries = client.xrange(keys.queue(PREFIX, keys.partition("acme", PARTITIONS)))
    facts = [decode(fields[FIELD.encode()]) for _, fields in entries]
    return [fact for fact in facts if isinstance(fact, ApprovalDecided)]


async def calls_of(visitor: httpx.AsyncClient, path: str = "/") -> list[str]:
    return re.findall(r'<li id="c-([^"]+)"', (await visitor.get(path)).text)


async def test_a_decision_is_stored_counted_and_logged(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    leave(queue.redis)
    leave(queue.redis, "c2", args={"order": "8", "euros": 90})
    caplog.set_level(logging.INFO)
    async with console(queue) as visitor:
        assert await calls_of(visitor) == ["acme/u1/s1/c1", "acme/u1/s1/c2"]
        assert '"euros": 90' in unescape((await visitor.get("/")).text)
        for call_id, decision in (("c1", "approve"), ("c2", "deny")):
            seen = await visitor.post("/decide", data={**FORM, "call": call_id, "decision": decision})
            assert (seen.status_code, seen.headers["location"]) == (303, "/")
        assert await calls_of(visitor) == []
    for call_id, approve in (("c1", True), ("c2", False)):
        stored = decided(queue.redis, call_id)
        assert stored is not None
        assert (stored["approve"], stored["by"]) == (approve, "console/10.0.0.7")
    facts = decisions(queue.redis)
    assert [(fact.id, fact.decision) for fact in facts] == [
        ("run-1:decision.c1", "approved"),
        ("run-1:decision.c2", "denied"),
    ]
    assert all(fact.end_ns - fact.start_ns >= 90_000_000_000 for fact in facts)
    assert "10.0.0.7 approved call c1 of tool refund in acme/u1/s1" in caplog.text
    assert "10.0.0.7 denied call c2 of tool refund in acme/u1/s1" in caplog.text


async def test_the_first_decision_holds_and_is_counted_once(queue: Queue) -> None:
    leave(queue.redis)
    async with console(queue) as visitor:
        clicks = await asyncio.gather(*(visitor.post("/decide", data=FORM) for _ in range(3)))
        assert sorted(seen.status_code for seen in clicks) == [303, 409, 409]
        seen = await visitor.post("/decide", data={**FORM, "decision": "deny"})
        assert (seen.status_code, "This call does not wait" in seen.text) == (409, True)
    assert (decided(queue.redis) or {})["approve"] is True
    assert len(decisions(queue.redis)) == 1


@pytest.mark.parametrize(
    ("mode", "content", "needs"),
    [
        ("read", "1", "Set AGX_CONSOLE=full to decide here."),
        ("full", "0", "Set AGX_CONSOLE_CONTENT=1 to decide here."),
        ("read", "0", "Set AGX_CONSOLE=full and AGX_CONSOLE_CONTENT=1 to decide here."),
    ],
)
async def test_nobody_decides_who_may_only_read_or_sees_no_arguments(
    queue: Queue, mode: str, content: str, needs: str
) -> None:
    leave(queue.redis)
    async with console(queue, mode, content) as visitor:
        page = (await visitor.get("/")).text
        assert (needs in page, "/decide" in page, "euros" in page) == (True, False, content == "1")
        assert (await visitor.post("/decide", data=FORM)).status_code == 403
    assert decided(queue.redis) is None


async def test_only_its_own_page_and_a_visitor_with_the_token_decide(queue: Queue) -> None:
    leave(queue.redis)
    async with console(queue) as visitor:
        foreign = await visitor.post("/decide", data=FORM, headers={"Origin": "http://evil.example"})
        assert foreign.status_code == 403
        assert (await visitor.get("/decide")).status_code == 405
        for form in ({**FORM, "decision": "maybe"}, {**FORM, "scope": "a:b"}, {}):
            assert (await visitor.post("/decide", data=form)).status_code == 400
        for form in ({**FORM, "scope": "globex"}, {**FORM, "user": "u2"}, {**FORM, "call": "c9"}):
            assert (await visitor.post("/decide", data=form)).status_code == 409
        visitor.cookies.clear()
        assert (await visitor.post("/decide", data=FORM)).status_code == 401
    assert decided(queue.redis) is None


async def test_what_is_made_elsewhere_or_by_the_service_or_is_not_shown_whole_is_not_approved(queue: Queue) -> None:
    leave(queue.redis, "elsewhere", kind="result")
    leave(queue.redis, "service", recipe=None)
    leave(queue.redis, "long", args={"text": "x" * 5_000})
    async with console(queue) as visitor:
        page = (await visitor.get("/")).text
        assert (page.count('value="approve"'), page.count('value="deny"')) == (0, 2)
        refused = (("elsewhere", "approve"), ("service", "approve"), ("service", "deny"), ("long", "approve"))
        for call_id, decision in refused:
            form = {**FORM, "call": call_id, "decision": decision}
            assert (await visitor.post("/decide", data=form)).status_code == 409
        form = {**FORM, "call": "elsewhere", "decision": "deny"}
        assert (await visitor.post("/decide", data=form)).status_code == 303


async def test_arguments_have_no_text_that_is_shown_in_another_order_or_not_at_all(queue: Queue) -> None:
    leave(queue.redis, args={"to": "\u202eecila\u202c", "sum": "1\u200b0", "note": "für 日本 👩\u200d💻"})
    async with console(queue) as visitor:
        page = unescape((await visitor.get("/")).text)
    assert r'"to": "\u202eecila\u202c"' in page
    assert r'"sum": "1\u200b0"' in page
    assert '"note": "für 日本 👩\u200d💻"' in page


async def test_what_is_no_call_and_what_a_model_has_named_harms_no_page(queue: Queue) -> None:
    attack = "<img src=x onerror=alert(1)>"
    leave(queue.redis, attack, tool=attack, args={attack: attack})
    for n, value in enumerate((b"", b"{", b"[]", b'{"scope_id": 1}')):
        queue.redis.hset(KEY, f"c:acme:u1:s1:bad{n}", value)
    queue.redis.hset(KEY, "x", "y")
    leave(queue.redis, "c2")
    queue.redis.hset(KEY, "d:acme:u1:s1:c2", b"{")  # a decision of a later version
    async with console(queue) as visitor:
        page = (await visitor.get("/")).text
        assert "<img src=x" not in page
        assert "Waiting for a decision" in page
        assert await calls_of(visitor, "/?q=globex") == []
        assert len(await calls_of(visitor, "/?q=s1")) == 1
