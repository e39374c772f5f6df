"""Calls that wait for a person or another system: `agx.pending()`, `agx.decide()`, and the run that goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from pydantic_ai import Agent, CallDeferred, DeferredToolRequests, FunctionToolset
from pydantic_ai.messages import ModelRequest, ToolReturnPart
from redis.asyncio import Redis
from support.agents import ScopeDeps, call, scripted
from support.recorded import read_recorded
from support.waiting import wait_until

import agx
from agx import cli
from agx.control.approvals import Decision
from agx.engine.registry import current_engine
from agx.errors import ConversationChangedError
from agx.facts.schema import ApprovalDecided
from agx.jobs.decide import expire_calls, go_on, record_decision
from agx.jobs.submit import open_queue
from agx.redis.keys import SessionKeys
from agx.redis_session import RedisSessions
from agx.testing import collect
from agx.web import make_router
from agx_sidecar.console import waiting_calls
from agx_sidecar.link import Link
from agx_sidecar.metrics.gauges import count_approvals

KEYS = SessionKeys.of("agx", "acme", "ada", "s")
WEEK = 7 * 86_400
REPLIES = ([*call("delete", '{"path": "/tmp"}', call_id="c1"), *call("measure", call_id="c2", index=1)], ["Done"])


@dataclass
class Scene:
    """An agent that leaves two calls to others, and a worker that has it."""

    deleted: list[str] = field(default_factory=list)
    replies: tuple[Any, ...] = (*REPLIES, ["More"])

    def __post_init__(self) -> None:
        def delete(path: str) -> str:
            self.deleted.append(path)
            return f"{path} is gone"

        def measure() -> str:
            raise CallDeferred

        tools = FunctionToolset[ScopeDeps]()
        tools.add_function(delete, requires_approval=True, metadata={"expires_in": WEEK})
        tools.add_function(measure)
        outputs: Any = [str, DeferredToolRequests]
        self.agent: Agent[ScopeDeps, Any] = Agent(
            scripted(*self.replies), deps_type=ScopeDeps, output_type=outputs, toolsets=[tools], name="support"
        )

    async def recipe(self, job: agx.Job) -> agx.Call:
        deps = ScopeDeps(scope=job.scope_id, user_id=job.user_id, session_id=job.session_id)
        return agx.Call(agx.RedisSession("acme", "ada", "s"), self.agent, deps)

    async def defer(self) -> str:
        """Have a run leave its two calls; returns its id."""
        run_id = await agx.submit("acme", "ada", "s", agent="support", prompt="Clean up")
        await wait_until(pending_ids)
        await wait_until(lambda: has_ended(run_id))
        return run_id

    async def returned(self) -> dict[str, Any]:
        """Return what the model got for its calls, by their ids."""
        session = agx.RedisSession("acme", "ada", "s")
        await session.load()
        return {
            part.tool_call_id: part.content
            for message in session.msgs
            if isinstance(message, ModelRequest)
            for part in message.parts
            if isinstance(part, ToolReturnPart)
        }


@pytest.fixture
async def scene(configured: Redis) -> AsyncIterator[Scene]:
    async with _working(Scene()) as working:
        yield working


async def pending_ids(user: str | None = None) -> list[str]:
    return [call.call_id for call in await agx.pending("acme", user)]


async def has_ended(run_id: str) -> bool:
    events = await collect("acme", "ada", "s", timeout=20)
    return bool(events) and events[0]["body"]["run_id"] == run_id and not await agx.is_live("acme", "ada", "s")


async def decide(call_id: str, **decision: Any) -> str | None:
    return await agx.decide("acme", "ada", "s", call_id=call_id, **decision)


async def decisions(client: Redis) -> list[ApprovalDecided]:
    """Return the facts of decisions as a sidecar counts them: each id once."""
    facts = (await read_recorded(client)).of(ApprovalDecided)
    return list({fact.id: fact for fact in facts}.values())


async def test_a_worker_goes_on_with_the_last_decision(scene: Scene, configured: Redis) -> None:
    run_id = await scene.defer()
    first, second = await agx.pending("acme")
    assert (first.tool, first.args, first.kind, first.run_id) == ("delete", {"path": "/tmp"}, "approval", run_id)
    assert (second.tool, second.kind, second.session) == ("measure", "result", ("acme", "ada", "s"))
    assert first.expires_ms == first.since_ms + WEEK * 1_000
    assert await pending_ids("ada") == ["c1", "c2"]
    assert await pending_ids("bob") == await agx.pending("globex") == []
    link = Link(cast("Any", configured))
    assert await count_approvals(link, "agx", current_engine().queues.partitions or 1) == {"acme": 2}
    for _ in range(2):  # the second one is a repeat
        assert await decide("c1", args={"path": "/var"}, by="eve", key="k") is None
    with pytest.raises(ConversationChangedError, match="decided already"):
        await decide("c1", approve=False, by="mallory")
    assert await pending_ids() == ["c2"]
    assert await count_approvals(link, "agx", current_engine().queues.partitions or 1) == {"acme": 1}
    next_id = await decide("c2", result={"degrees": 21})
    assert next_id is not None
    await wait_until(lambda: has_ended(next_id))
    assert await scene.returned() == {"c1": "/var is gone", "c2": {"degrees": 21}}
    assert scene.deleted == ["/var"]
    assert await agx.pending("acme") == []
    with pytest.raises(agx.NotPendingError):
        await decide("c2", result=1)
    facts = await decisions(configured)
    assert [(fact.agent, fact.decision, fact.run_id) for fact in facts] == [("support", "approved", run_id)] * 2


@pytest.mark.parametrize("expires_in", ["7 days", timedelta(days=7), float("nan"), float("inf")])
async def test_a_call_with_an_odd_id_or_expiry_waits_and_its_conversation_is_stored(
    configured: Redis, expires_in: object, caplog: pytest.LogCaptureFixture
) -> None:
    tools = FunctionToolset[ScopeDeps]()
    tools.add_function(lambda: None, name="delete", requires_approval=True, metadata={"expires_in": expires_in})
    model, outputs = scripted([*call("delete", call_id="c\ud800")]), [str, DeferredToolRequests]
    agent: Agent[ScopeDeps, Any] = Agent(model, deps_type=ScopeDeps, output_type=outputs, toolsets=[tools])
    session = agx.RedisSession("acme", "ada", "s", ttl=60)
    await agx.run(session, agent, "Clean up", deps=ScopeDeps(scope="acme", user_id="ada", session_id="s"))
    (waiting,) = await agx.pending("acme")
    assert waiting.call_id == "c?"
    if expires_in == float("inf"):
        assert waiting.expires_ms is not None
    else:
        assert waiting.expires_ms is None
        assert "expires_in of tool delete must be a number of seconds" in caplog.text
    await session.load()
    assert len(session.msgs) == 2


async def test_a_denied_call_is_not_made(scene: Scene) -> None:
    await scene.defer()
    await decide("c2", approve=False)
    next_id = await decide("c1", approve=False)
    assert next_id is not None
    await wait_until(lambda: has_ended(next_id))
    assert await scene.returned() == {"c1": "The tool call was denied.", "c2": "The tool call was denied."}
    assert scene.deleted == []


async def test_what_is_not_decided_in_time_is_denied_once(scene: Scene, configured: Redis) -> None:
    await scene.defer()
    await decide("c2", result="warm")
    engine = current_engine()
    await expire_calls(engine)
    assert await pending_ids() == ["c1"]
    engine.clock.at_least(engine.clock.now_ms() + WEEK * 1_000)
    await asyncio.gather(expire_calls(engine), expire_calls(engine))
    await wait_until(lambda: has_answered("Nobody decided on this call in time.", scene))
    assert scene.deleted == []
    assert sorted(fact.decision for fact in await decisions(configured)) == ["approved", "expired"]


async def has_answered(text: str, scene: Scene) -> bool:
    return text in (await scene.returned()).values()


async def test_a_run_whose_decider_died_goes_on_once(scene: Scene) -> None:
    await scene.defer()
    engine = current_engine()
    await decide("c2", result="warm")
    calls = await record_decision(engine, KEYS, "c1", Decision(approve=True))  # here the process dies
    assert calls is not None
    await asyncio.gather(expire_calls(engine), expire_calls(engine), go_on(engine, calls))
    await wait_until(lambda: has_answered("/tmp is gone", scene))
    queue = open_queue(engine, "-")
    await wait_until(lambda: is_empty(queue))
    assert scene.deleted == ["/tmp"]


async def is_empty(queue: Any) -> bool:
    return not any([await queue.waiting(n) for n in range(current_engine().queues.partitions or 1)])


async def test_the_next_prompt_ends_the_wait(scene: Scene) -> None:
    await scene.defer()
    run_id = await agx.submit("acme", "ada", "s", agent="support", prompt="Forget it")
    await wait_until(lambda: has_ended(run_id))
    assert await agx.pending("acme") == []
    with pytest.raises(agx.NotPendingError):
        await decide("c1")


@pytest.mark.parametrize(
    ("ids", "call_id"), [(("globex", "ada", "s"), "c1"), (("acme", "bob", "s"), "c1"), (("acme", "ada", "s"), "c9")]
)
async def test_only_a_call_of_the_session_is_decided(scene: Scene, ids: tuple[str, str, str], call_id: str) -> None:
    await scene.defer()
    with pytest.raises(agx.NotPendingError):
        await agx.decide(*ids, call_id=call_id)
    with pytest.raises(agx.AgxError, match="JSON"):
        await decide("c1", args={"path": object()})
    assert await pending_ids() == ["c1", "c2"]


async def test_a_router_goes_on_with_its_own_run(configured: Redis) -> None:
    scene = Scene()
    app = FastAPI()
    router = make_router(
        scene.agent,
        authorize=lambda: ("acme", "ada"),
        sessions=RedisSessions(),
        make_deps=lambda scope, user, session: ScopeDeps(scope=scope, user_id=user, session_id=session),
    )
    app.include_router(router, prefix="/api")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        started = await client.post("/api/sessions/s/runs", json={"prompt": "Clean up"})
        await wait_until(lambda: has_ended(started.json()["run_id"]))
        listed = (await client.get("/api/approvals")).json()["calls"]
        assert [(call["session_id"], call["call_id"], call["tool"]) for call in listed] == [
            ("s", "c1", "delete"),
            ("s", "c2", "measure"),
        ]
        url = "/api/sessions/s/decisions"
        assert (await client.post(url, json={"call_id": "c9", "approve": True})).status_code == 404
        assert (await client.post(url, json={"approve": True})).status_code == 422
        waits = await client.post(url, json={"call_id": "c1", "approve": True, "key": "k"})
        assert (waits.status_code, waits.json()) == (202, {"run_id": None})
        assert (await client.post(url, json={"call_id": "c1", "approve": False})).status_code == 409
        went_on = await client.post(url, json={"call_id": "c2", "approve": True, "result": "warm"})
        await wait_until(lambda: has_ended(went_on.json()["run_id"]))
    assert await scene.returned() == {"c1": "/tmp is gone", "c2": "warm"}
    assert await agx.pending("acme") == []


async def test_the_command_line_lists_and_decides(
    scene: Scene, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await scene.defer()

    async def said(*args: str) -> tuple[int, str]:
        code = await asyncio.to_thread(cli.main, [*args, "--redis", redis_url])
        return code, "".join(capsys.readouterr())

    code, listed = await said("pending", "acme", "--json")
    assert (code, [call["call_id"] for call in json.loads(listed)]) == (0, ["c1", "c2"])
    code, listed = await said("pending", "acme")
    assert (code, '{"path":"/tmp"}' in listed) == (0, True)
    assert await said("pending", "globex") == (0, "nothing waits\n")
    code, refused = await said("decide", "acme/ada/s", "c2", "--result", "warm")
    assert (code, "--result must be JSON" in refused) == (1, True)
    assert await said("decide", "acme/ada/s", "c1", "--deny", "--by", "eve") == (
        0,
        "acme/ada/s: stored; other calls wait\n",
    )
    code, refused = await said("decide", "acme/ada/s", "c1", "--approve")
    assert (code, "decided already" in refused) == (1, True)
    code, went_on = await said("decide", "acme/ada/s", "c2", "--result", '"warm"', "--json")
    run_id = json.loads(went_on)["run_id"]
    await wait_until(lambda: has_ended(run_id))
    assert await scene.returned() == {"c1": "The tool call was denied.", "c2": "warm"}


async def test_all_processes_restart_and_seven_days_pass(redis_url: str) -> None:
    """Between the run and the last decision no process lives, and what Redis does not keep for a week is gone."""
    async with _service(redis_url) as client:
        async with _working(Scene()) as before:
            run_id = await before.defer()
        await decide("c2", result={"degrees": 21}, by="station")
    async with Redis.from_url(redis_url) as client:
        await _age(client, seconds=WEEK - 60)
    async with _service(redis_url) as client:
        (left,) = await agx.pending("acme")
        assert (left.call_id, left.run_id) == ("c1", run_id)
        next_id = await decide("c1", by="eve")  # no worker lives yet
        assert next_id is not None
        async with _working(Scene(replies=REPLIES[1:])) as after:
            await wait_until(lambda: has_ended(next_id))
            assert await after.returned() == {"c1": "/tmp is gone", "c2": {"degrees": 21}}
        assert (before.deleted, after.deleted) == ([], ["/tmp"])
        assert await agx.pending("acme") == []


@asynccontextmanager
async def _service(redis_url: str) -> AsyncIterator[Redis]:
    """A process of the service, from its configuration to its end."""
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client))
        yield client
        await agx.aclose()


@asynccontextmanager
async def _working(scene: Scene) -> AsyncIterator[Scene]:
    worker = agx.Worker({"support": scene.recipe})
    working = asyncio.create_task(worker.run())
    yield scene
    worker.stop()
    await working


async def _age(client: Redis, *, seconds: int) -> None:
    """Make every key so much older: the server deletes what expires meanwhile."""
    async for key in client.scan_iter():
        await client.pexpire(key, max(1, await client.pttl(key) - seconds * 1_000))


async def test_a_console_wakes_the_worker_that_goes_on(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agx.jobs.worker._EXPIRE_EVERY", 3_600)  # its next look without a wake-up is far away
    async with _working(Scene()) as scene:
        await scene.defer()
        await decide("c2", approve=False)
        form = {"scope": "acme", "user": "ada", "session": "s", "call": "c1", "decision": "approve"}
        decided, decision = await waiting_calls.decide(current_engine().control, "agx", form, "console/10.0.0.1")
        assert (decided.tool, decision.by) == ("delete", "console/10.0.0.1")
        await wait_until(lambda: has_answered("/tmp is gone", scene))
    assert sorted(fact.decision for fact in await decisions(configured)) == ["approved", "denied"]
