"""A router whose `make_deps` or store is wrong: refused when it is made, or answered with a sentence and a code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import ScopeDeps

from agx.error_codes import RUN_FAILED
from agx.redis.keys import Id
from agx.sessions.redis_session import RedisSession, RedisSessions
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router

MakeRouter = Callable[..., APIRouter]
ROUTERS = [make_router, make_vercel_ai_router, make_ag_ui_router]
AGENT = Agent("test", deps_type=ScopeDeps, name="shop")


def authorize() -> tuple[str, str]:
    return "acme", "ada"


def make_shop_deps(scope: Id, user: Id, session: str) -> ScopeDeps:
    return ScopeDeps(scope=scope, user_id=user, session_id=session)


async def make_later(scope: Id, user: Id, session: str) -> ScopeDeps:
    return make_shop_deps(scope, user, session)


@pytest.mark.parametrize("make", ROUTERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "agent 'shop' takes deps of type ScopeDeps: give the router make_deps="),
        ({"make_deps": ScopeDeps}, "make_deps must take the scope, the user and the session, in this order: "),
        ({"make_deps": lambda scope, user: None}, "make_deps must take the scope, the user and the session"),
        ({"make_deps": make_later}, "make_deps must be a plain function"),
    ],
)
def test_deps_that_cannot_be_made_are_refused_when_the_router_is_made(
    make: MakeRouter, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make(AGENT, authorize=authorize, sessions=RedisSessions(), **given)


class BrokenSession(RedisSession):
    async def load(self) -> None:
        raise LookupError("secret")


class BrokenSessions(RedisSessions):
    def open(self, scope_id: Id, user_id: Id, session_id: Id) -> RedisSession:
        return BrokenSession(scope_id, user_id, session_id)


def make_nothing(scope: Id, user: Id, session: str) -> Any:
    raise LookupError("secret")


@pytest.mark.parametrize(
    ("given", "logged"),
    [
        ({"make_deps": make_nothing, "sessions": RedisSessions()}, "agx: a run could not be started"),
        ({"make_deps": lambda *ids: object(), "sessions": RedisSessions()}, "agx: a run could not be started"),
        ({"make_deps": make_shop_deps, "sessions": BrokenSessions()}, " failed: session acme/ada/s, agent shop"),
    ],
    ids=["deps-raise", "no-deps", "load-raises"],
)
async def test_what_fails_before_a_run_is_answered_and_logged_once_and_the_session_stays_free(
    configured: Redis, caplog: pytest.LogCaptureFixture, given: dict[str, Any], logged: str
) -> None:
    app = FastAPI()
    app.include_router(make_router(AGENT, authorize=authorize, **given), prefix="/broken")
    works = {"make_deps": make_shop_deps, "sessions": RedisSessions()}
    app.include_router(make_router(AGENT, authorize=authorize, **works), prefix="/works")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post("/broken/sessions/s/runs", json={"prompt": "Hi"})
        assert (answer.status_code, answer.json()) == (500, {"detail": RUN_FAILED.sentence, "code": RUN_FAILED.code})
        assert [logged in record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [True]
        assert (await client.post("/works/sessions/s/runs", json={"prompt": "Hi"})).status_code == 202
        await client.get("/works/sessions/s/events")
