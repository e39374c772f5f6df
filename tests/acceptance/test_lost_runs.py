"""A service process is killed: a real sidecar finishes its run for listeners, metrics and traces."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.forked import Forked
from support.otlp import OtlpReceiver
from support.recorded import read_recorded
from support.replica import Replica
from support.sdk import SpanLedger, installed_sdk
from support.service import running_service
from support.waiting import wait_until

import agx
from agx.facts import schema as facts
from agx.redis.bus import Script
from agx.redis.live_key import CLAIM, RELEASE, new_claim
from agx.stream.writer import SessionWriter

StartService = Callable[..., AbstractAsyncContextManager[Forked]]


@pytest.fixture
def service(tmp_path: Path, redis_url: str) -> StartService:
    """Starts a process that runs an agent and holds at a stage."""
    return partial(running_service, tmp_path, redis_url)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=0.9))
        yield client
        await agx.aclose()


@pytest.fixture
def sidecar(tmp_path: Path, redis_url: str, otlp: OtlpReceiver) -> Iterator[Replica]:
    replica = Replica(tmp_path / "sidecar", redis_url, OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint_http)
    yield replica
    replica.end()


async def _follow_to_the_end(session: str = "s") -> list[dict[str, object]]:
    return [event async for event in agx.listen(1, 1, session, serialize=False)]


# What has to have reached the server before the process is killed: what had not is nobody's to know.
REACHED = {"talking": "part_delta", "silent": "llm-begin", "tool": "llm-end", "sub-agent": "llm-end"}


async def _end_of(process: Forked) -> str:
    """Wait until a service ends; return the error that ended its run."""
    assert await asyncio.to_thread(process.wait) == 0, process.said
    return process.said.splitlines()[-1]


async def _has_ended(redis: Redis) -> bool:
    return bool((await read_recorded(redis)).of(facts.RunEnded))


async def _has_recorded(redis: Redis, stage: str) -> bool:
    recorded = await read_recorded(redis)
    agents = 2 if stage == "sub-agent" else 1
    return len(recorded.of(facts.RunStarted)) == agents and any(
        body["event"] == REACHED[stage] for body in recorded.bodies("event")
    )


@pytest.mark.parametrize("stage", REACHED)
@pytest.mark.parametrize("sdk", [False, True], ids=["no-sdk", "sdk"])
async def test_a_killed_run_is_finished(
    stage: str, sdk: bool, redis: Redis, service: StartService, sidecar: Replica, otlp: OtlpReceiver
) -> None:
    async with service(stage, sdk=sdk) as process:
        listening = asyncio.create_task(_follow_to_the_end())
        await wait_until(lambda: _has_recorded(redis, stage))
        process.send(signal.SIGKILL)
        events = await asyncio.wait_for(listening, 30)
    assert [event["type"] for event in events[-2:]] == ["error", "end"]
    assert events[-1]["body"]["outcome"] == "lost"  # type: ignore[index] # a body is an object
    assert [event["body"]["seq"] for event in events] == list(range(len(events)))  # type: ignore[index]

    runs = 2 if stage == "sub-agent" else 1
    await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome="lost") == runs)
    scraped = sidecar.scrape()
    assert scraped.total("agx_runs_started_total") == runs
    assert scraped.total("agx_runs_total") == runs
    await wait_until(lambda: scraped_live(sidecar) == 0)
    recorded = await read_recorded(redis)
    started = {fact.run_id: fact for fact in recorded.of(facts.RunStarted)}
    assert {fact.run_id for fact in recorded.of(facts.RunEnded)} == set(started)
    assert len({fact.id for fact in recorded.facts}) == len(recorded.facts)
    assert not await redis.exists("agx:1:1:s:live")
    assert [await redis.zcard(f"agx::leases:{n}") for n in range(8)] == [0] * 8
    assert not await redis.zcard("agx:1:1")

    run = next(fact for fact in recorded.of(facts.RunEnded) if fact.parent_run_id is None)
    expected = {"agx.run staged", "agx.stream"} if sdk else {"invoke_agent staged", "agx.stream"}
    if not sdk:
        expected |= {"chat function::_stream"} | ({"execute_tool work"} if stage in ("tool", "sub-agent") else set())
    else:
        # Of the sub-agent's run, too, the dead SDK held the span.
        assert run.trace.sdk
    await wait_until(lambda: expected <= {span.name for span in otlp.spans})
    spans = [span for span in otlp.spans if span.trace_id == run.trace.trace_id]
    assert len({span.span_id for span in spans}) == len(spans)
    root = next(span for span in spans if span.span_id == run.trace.span_id)
    assert root.attributes["agx.run.outcome"] == "lost"
    assert root.attributes["agx.trace.partial"] is True


def scraped_live(sidecar: Replica) -> float:
    return sidecar.scrape().total("agx_runs_live")


async def test_a_stalled_process_finds_itself_fenced(redis: Redis, service: StartService, sidecar: Replica) -> None:
    async with service("talking") as process:
        listening = asyncio.create_task(_follow_to_the_end())
        process.send(signal.SIGSTOP)
        events = await asyncio.wait_for(listening, 30)
        await wait_until(lambda: _has_ended(redis))
        before = await read_recorded(redis)
        process.send(signal.SIGCONT)
        # It is asked nothing, and still finds out by itself at its next renewal or append.
        assert await agx.cancel(1, 1, "s") in (True, False)
        assert await _end_of(process) == "LeaseLostError"
    assert events[-1]["body"]["outcome"] == "lost"  # type: ignore[index]
    after = await read_recorded(redis)
    assert after.entries == before.entries
    assert [fact.id for fact in after.of(facts.RunEnded)] == [fact.id for fact in before.of(facts.RunEnded)]
    assert not await redis.exists("agx:1:1:s:live")


async def _renewals(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


@pytest.mark.parametrize("ends", ["released", "expired"])
async def test_a_claim_that_a_waking_process_finds_decides_nothing(
    ends: str, redis: Redis, service: StartService
) -> None:
    """B1: the process is stopped, its lease expires, a recovery claims the session, and the process wakes up."""
    live = "agx:1:1:s:live"
    async with service("talking") as process:
        run_id = await redis.get(live)
        process.send(signal.SIGSTOP)
        claim = new_claim()
        await wait_until(lambda: redis.eval(CLAIM.source, 1, live, claim, 60_000))
        before = await _renewals(redis)
        process.send(signal.SIGCONT)

        async def has_seen_it() -> bool:
            return await _renewals(redis) >= before + 3

        await wait_until(has_seen_it)
        assert await redis.get(live) == claim.encode()
        assert await redis.pttl(live) > 30_000  # nor does a renewal change the claim's own expiry
        await (redis.eval(RELEASE.source, 1, live, claim) if ends == "released" else redis.pexpire(live, 1))

        async def is_taken_again() -> bool:
            return bool(await redis.get(live) == run_id)

        await wait_until(is_taken_again)
        assert await agx.cancel(1, 1, "s")
        assert await _end_of(process) == "AgxCanceledError"
    recorded = await read_recorded(redis)
    assert [body["outcome"] for body in recorded.bodies("end")] == ["cancelled"]
    assert recorded.one(facts.RunEnded).outcome == "cancelled"
    assert not await redis.exists(live)
    assert [await redis.zcard(f"agx::leases:{n}") for n in range(8)] == [0] * 8


async def test_a_server_that_takes_no_writes_for_longer_than_a_lease(
    redis: Redis, service: StartService, sidecar: Replica
) -> None:
    """B2: afterwards the process and the recovery come at once, in any order; caller, stream and count agree."""
    async with service("talking") as process:
        await wait_until(sidecar.leads)
        await redis.execute_command("CLIENT", "PAUSE", 2_500, "WRITE")

        async def has_been_cancelled() -> bool:
            try:
                await agx.cancel(1, 1, "s")
            except agx.RedisUnavailableError:
                return False
            return process.ended

        await wait_until(has_been_cancelled)
        said = await _end_of(process)
    await wait_until(lambda: _has_ended(redis))
    outcome = {"AgxCanceledError": "cancelled", "LeaseLostError": "lost"}[said]
    await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome=outcome) == 1)
    assert sidecar.scrape().total("agx_runs_total") == 1
    recorded = await read_recorded(redis)
    assert [body["outcome"] for body in recorded.bodies("end")] == [outcome]
    assert {(fact.id, fact.outcome) for fact in recorded.of(facts.RunEnded)} == {
        (recorded.of(facts.RunEnded)[0].id, outcome)
    }

    async def is_left_nowhere() -> bool:
        deadlines = [await redis.zcard(f"agx::leases:{n}") for n in range(8)]
        return not any(deadlines) and not await redis.exists("agx:1:1:s:live")

    await wait_until(is_left_nowhere)


async def test_a_session_goes_on_after_its_run_was_lost(redis: Redis, service: StartService, sidecar: Replica) -> None:
    async with service("talking") as process:
        process.send(signal.SIGKILL)
        await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome="lost") == 1)
        result = await agx.run(FakeSession(), ScriptedAgent().agent(), "Again", deps=ScopeDeps())
    assert result.output == "one two three"
    await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome="completed") == 1)
    assert (await read_recorded(redis)).text == "one two three"


@pytest.mark.parametrize("sdk", [False, True], ids=["no-sdk", "sdk"])
async def test_a_run_that_began_although_its_caller_got_an_error_is_finished(
    sdk: bool, redis: Redis, sidecar: Replica, otlp: OtlpReceiver
) -> None:
    """The process was held still, or Redis was away, between the `begin` and its answer."""
    append = SessionWriter._append_first

    async def append_in_vain(writer: SessionWriter, script: Script, *arguments: Any) -> None:
        await append(writer, script, *arguments)
        raise TimeoutError

    # The sidecar begins its work when a service has published the meta.
    await agx.start(1, 1, "first")
    await agx.stop(1, 1, "first")
    await wait_until(sidecar.leads)
    with installed_sdk() if sdk else nullcontext(SpanLedger()) as spans:
        listening = asyncio.create_task(_follow_to_the_end())
        with (
            patch.object(SessionWriter, "_append_first", append_in_vain),
            patch("agx.stream.writer.COMMAND_TIMEOUT", 0),
            pytest.raises(agx.RedisUnavailableError),
        ):
            await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
        events = await asyncio.wait_for(listening, 30)
        assert [event["type"] for event in events] == ["begin", "error", "end"]
        await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome="lost") == 1)
        assert sidecar.scrape().total("agx_runs_started_total") == 1
        name = "agx.run staged" if sdk else "invoke_agent staged"
        await wait_until(lambda: {name, "agx.stream"} == {span.name for span in otlp.spans})
        assert spans.ended == []
    assert [await redis.zcard(f"agx::leases:{n}") for n in range(8)] == [0] * 8


async def test_without_a_sidecar_listeners_end_by_themselves(redis: Redis, service: StartService) -> None:
    async with service("talking") as process:
        listening = asyncio.create_task(_follow_to_the_end())
        process.send(signal.SIGKILL)
        events = await asyncio.wait_for(listening, 30)
    assert events[-1]["type"] == "error"
    body = events[-1]["body"]
    assert isinstance(body, dict)
    assert (body["error_type"], body["code"]) == ("lost", "run_lost")


async def _lose_a_run_that_can_not_be_finalized(redis: Redis, service: StartService) -> None:
    async with service("talking", session="bad") as process:
        await wait_until(lambda: _has_queued_a_fact(redis, b'"session":"bad"'))  # its stream will be gone
        process.send(signal.SIGKILL)
    await redis.set("agx:1:1:bad", "no stream", ex=60)


async def _has_queued_a_fact(redis: Redis, part: bytes) -> bool:
    queued = [fields[b"fact"] for n in range(8) for _, fields in await redis.xrange(f"agx::queue:{n}")]
    return any(part in fact for fact in queued)


async def test_what_others_wrote_into_a_stream_stops_no_recovery(
    redis: Redis, service: StartService, sidecar: Replica
) -> None:
    """One run that can't be finalized is passed over; one whose stream holds junk is finalized like any other."""
    async with service("talking") as process:
        await wait_until(lambda: _has_recorded(redis, "talking"))
        await _lose_a_run_that_can_not_be_finalized(redis, service)
        listening = asyncio.create_task(_follow_to_the_end())
        for body in ({"seq": "step-1"}, {"seq": None}, {"seq": 500}, {"seq": 2**60}, {"retention": "x"}):
            await agx.add(1, 1, "s", type="info", origin="user", body=body)
        await redis.xadd("agx:1:1:s", {b"type": b"\xff\xfe", b"origin": b"\xff", b"body": b"\xff"})
        await redis.xadd("agx:1:1:s", {b"nothing": b""})
        await redis.zadd("agx::leases:1", {b"\xff": 1, b"a:b": 1, b"::queue:0": 1})
        process.send(signal.SIGKILL)
        events = await asyncio.wait_for(listening, 30)
    own = [event["body"]["seq"] for event in events if event["origin"] in ("opale", "pydantic-ai")]  # type: ignore[index]
    assert own == list(range(len(own)))
    assert [event["type"] for event in events[-2:]] == ["error", "end"]
    await wait_until(lambda: "can't be finalized (ResponseError)" in sidecar.log)
    await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome="lost") == 1)
    assert sidecar.log.count("can't be finalized") == 1  # not once a second
    left = [member for n in range(8) for member in await redis.zrange(f"agx::leases:{n}", 0, -1)]
    assert [member.rpartition(b":")[0] for member in left] == [b"1:1:bad"]
    await redis.delete("agx:1:1:bad")
    await wait_until(lambda: sidecar.scrape().total("agx_runs_total", outcome="lost") == 2)
