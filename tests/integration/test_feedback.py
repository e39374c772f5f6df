"""`agx.feedback()`: a score of a run that has ended, counted once, in the run's trace, for its own tenant only."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, scripted
from support.docs import every_block
from support.run_facts import FactsOfRun
from support.waiting import wait_until

import agx
from agx.facts.schema import RunEnded, RunFeedback
from agx.redis_session import RedisSessions
from agx.telemetry.conventions import CAPTURE_CONTENT
from agx.testing import collect
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router
from agx_sidecar.metrics import instruments as i
from agx_sidecar.traces.spans import spans_of

AGENT = Agent(scripted(["Sunny"]), deps_type=ScopeDeps, name="weather")


@pytest.fixture
async def run_id(configured: Redis) -> str:
    """A run that has ended; nothing of its session is left, as a day later."""
    with AGENT.override(model=scripted(["Sunny"])):
        await agx.run(FakeSession(), AGENT, "Weather?", ScopeDeps())
    events = await collect(1, 1, "s")
    found = str(events[0]["body"]["run_id"])
    await FactsOfRun.read(configured, found)
    await configured.delete("agx:1:1:s")
    return found


async def scores(client: Redis, run_id: str) -> list[RunFeedback]:
    return (await FactsOfRun.read(client, run_id)).of(RunFeedback)


async def test_a_score_is_in_the_trace_of_its_run_and_is_counted(configured: Redis, run_id: str) -> None:
    await agx.feedback(1, 1, "s", run_id=run_id, name="thumb", value=True, by="ada")
    recorded = await FactsOfRun.read(configured, run_id)
    ((fact,), (end,)) = recorded.of(RunFeedback), recorded.of(RunEnded)
    assert (fact.agent, fact.model, fact.value, fact.by) == (
        "weather",
        recorded.requests[0].model.request_model,
        1.0,
        "ada",
    )  # type: ignore[union-attr]
    (span,) = spans_of(fact)
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == end.trace.trace_id
    assert f"{span.parent.span_id:016x}" == end.trace.span_id
    (event,) = span.events
    assert (event.name, dict(event.attributes or {})) == (
        "gen_ai.evaluation.result",
        {"gen_ai.evaluation.name": "thumb", "gen_ai.evaluation.score.value": 1.0},
    )
    assert recorded.count(i.FEEDBACK) == 1


async def test_a_repeat_with_the_same_key_counts_once(configured: Redis, run_id: str) -> None:
    for name, key in (("thumb", "k"), ("thumb", "k"), ("tone", "k"), ("thumb", None), ("thumb", None)):
        await agx.feedback(1, 1, "s", run_id=run_id, name=name, value=0, key=key)
    recorded = await FactsOfRun.read(configured, run_id)
    assert recorded.count(i.FEEDBACK) == 4
    assert (
        len({span.context.span_id for fact in recorded.of(RunFeedback) for span in spans_of(fact) if span.context}) == 4
    )


async def test_a_comment_is_content(configured: Redis, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await agx.feedback(1, 1, "s", run_id=run_id, name="thumb", value=0, comment="wrong town")
    monkeypatch.setenv(CAPTURE_CONTENT, "true")
    await agx.feedback(1, 1, "s", run_id=run_id, name="thumb", value=0, comment="wrong town")
    assert [fact.comment for fact in await scores(configured, run_id)] == [None, "wrong town"]


@pytest.mark.parametrize(("scope", "user", "session"), [(2, 1, "s"), (1, 2, "s"), (1, 1, "t")])
async def test_a_foreign_run_is_refused(configured: Redis, run_id: str, scope: int, user: int, session: str) -> None:
    with pytest.raises(agx.RunUnknownError):
        await agx.feedback(scope, user, session, run_id=run_id, name="thumb", value=1)
    with pytest.raises(agx.RunUnknownError):
        await agx.feedback(1, 1, "s", run_id=f"{run_id}0", name="thumb", value=1)
    assert await scores(configured, run_id) == []


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"value": -0.1}, ValueError),
        ({"value": 100.1}, ValueError),
        ({"value": float("nan")}, ValueError),
        ({"value": "1"}, TypeError),
        ({"name": ""}, ValueError),
        ({"name": "n" * 51}, ValueError),
        ({"comment": "c" * 4_097}, ValueError),
        ({"comment": b"c"}, TypeError),
        ({"by": "a:b"}, ValueError),
        ({"key": "*"}, ValueError),
        ({"run_id": "a:b"}, ValueError),
    ],
)
async def test_what_is_out_of_bounds_is_refused_before_redis_is_asked(given: dict[str, Any], error: type) -> None:
    agx.configure(agx.Config(Redis(port=1)))
    with pytest.raises(error):
        await agx.feedback(1, 1, "s", **{"run_id": "r", "name": "thumb", "value": 1, **given})


async def test_the_block_of_the_page(configured: Redis) -> None:
    page: dict[str, Any] = {}
    with every_block("docs/how-to/feedback.md") as blocks:
        exec(blocks.take("python"), page)
    with AGENT.override(model=scripted(["Sunny"])):
        await agx.run(agx.RedisSession("acme", "ada", "c"), AGENT, "Hi", Mine(user_id="ada", session_id="c"))
    run_id = (await collect("acme", "ada", "c"))[0]["body"]["run_id"]
    await FactsOfRun.read(configured, run_id)
    await page["thumb"]("c", run_id, True)
    await page["thumb"]("c", run_id, False, "a second click")
    recorded = await FactsOfRun.read(configured, run_id)
    assert recorded.count(i.FEEDBACK) == 1


class Mine(agx.Deps):
    def get_scope_id(self) -> str:
        return "acme"


async def test_over_http(configured: Redis) -> None:
    app, given = FastAPI(), {"authorize": lambda: ("acme", "ada"), "sessions": RedisSessions()}
    agent = Agent(scripted(["Hello"]), name="a")
    app.include_router(make_router(agent, **given), prefix="/api")  # type: ignore[arg-type]
    app.include_router(make_vercel_ai_router(agent, **given), prefix="/chat")  # type: ignore[arg-type]
    app.include_router(make_ag_ui_router(agent, **given), prefix="/ag-ui")  # type: ignore[arg-type]
    paths = ("/api/sessions/s/feedback", "/chat/s/feedback", "/ag-ui/s/feedback")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        started = await client.post("/api/sessions/s/runs", json={"prompt": "Hi"})
        run_id = started.json()["run_id"]
        await FactsOfRun.read(configured, run_id)
        for path in paths:
            reply = await client.post(path, json={"run_id": run_id, "value": 1, "key": path.split("/")[1]})
            assert (reply.status_code, reply.json()) == (200, {"recorded": True})
            unknown = await client.post(path, json={"run_id": "other", "value": 1})
            assert (unknown.status_code, unknown.json()["code"]) == (404, "run_unknown")
        for body in ({}, {"run_id": run_id}, {"run_id": run_id, "value": 101}, {"run_id": "a:b", "value": 1}):
            assert (await client.post(paths[0], json=body)).status_code == 422, body
    facts = await wait_until(lambda: scores(configured, run_id))
    assert [(fact.name, fact.by) for fact in facts] == [("thumb", "ada")] * 3
