"""A worker is killed or stopped in the middle of a run: another one goes on, and the run ends once, with its answer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai.messages import ModelResponse
from redis.asyncio import Redis
from support.agents import prompts
from support.durable_worker import STEPS, TOOLS, WORDS, Ledger, work
from support.forked import Forked
from support.run_facts import FactsOfRun
from support.waiting import wait_until

import agx
from agx.facts.schema import ToolEnded

# When the worker is killed: as soon as the ledger has this line, or the stream this event.
POINTS = ["model 0", "quick 0", "slow 0", "model 1", "slow 2", "model 3"]


class Workers:
    """Two worker processes on one server."""

    def __init__(self, url: str, ledger: Ledger, path: Path) -> None:
        self.ledger = ledger
        self.url = url
        self._path = path
        self.processes: list[Forked] = []

    async def start(self, count: int) -> None:
        for _ in range(count):
            log = self._path.with_name(f"worker-{len(self.processes)}.log")
            self.processes.append(Forked(work, self.url, self._path, log=log))
        for process in self.processes[-count:]:
            await wait_until(lambda process=process: process.said == "ready\n", what=f"a worker: {process.said}")

    async def signal_who_has(self, line: str, how: signal.Signals) -> int:
        """Signal the process that wrote a line of the ledger; returns its pid."""
        pid = await wait_until(lambda: next((pid for pid, what in self.ledger.read() if what == line), None))
        os.kill(pid, how)
        return pid

    def end(self) -> None:
        for process in self.processes:
            process.end(signal.SIGKILL)


@pytest.fixture
async def workers(redis_url: str, tmp_path: Path) -> AsyncIterator[Workers]:
    path = tmp_path / "ledger"
    workers = Workers(redis_url, Ledger(path), path)
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=0.9, retention=60))
        try:
            yield workers
        finally:
            workers.end()
            await agx.aclose()


async def _submit() -> list[dict[str, Any]]:
    await agx.submit("acme", "ada", "s", agent="support", prompt="Where is my order?")
    events = agx.listen("acme", "ada", "s", serialize=False, wait=60, timeout=60)
    return [event async for event in events]


def _check(events: list[dict[str, Any]], ledger: Ledger, attempts: int) -> None:
    bodies = [event["body"] for event in events]
    assert [body["seq"] for body in bodies] == list(range(len(bodies)))
    assert [event["type"] for event in events if event["type"] in ("begin", "end")] == ["begin", "end"]
    assert bodies[-1]["outcome"] == "completed"
    resumes = [event["body"] for event in events if event["type"] == "resume"]
    assert [body["attempt"] for body in resumes] == list(range(2, attempts + 1))
    returns = Counter(body["tool_call_id"] for body in bodies if body.get("part_kind") == "tool-return")
    assert returns == {f"{tool}{step}": 1 for tool in TOOLS for step in range(STEPS)}
    assert len({body["idx"] for body in bodies if body.get("event") == "llm-begin"}) == STEPS + 1 + sum(
        body["void"] is not None for body in resumes
    )
    last = max(body["idx"] for body in bodies if "idx" in body)
    text = [
        body.get("content", "") + body.get("content_delta", "")
        for body in bodies
        if body.get("idx") == last and body.get("part_kind") == "text"
    ]
    assert "".join(text) == "".join(WORDS)


@pytest.mark.parametrize("point", POINTS)
async def test_a_killed_worker_s_run_goes_on_in_another(workers: Workers, point: str) -> None:
    await workers.start(2)
    following = asyncio.create_task(_submit())
    await workers.signal_who_has(point, signal.SIGKILL)
    events = await following
    _check(events, workers.ledger, attempts=2)
    made = Counter(what.replace(" ", "") for _, what in workers.ledger.read() if not what.startswith("model"))
    types = [event["type"] for event in events]
    before = [event["body"] for event in events[: types.index("resume")]]
    completed = {body["tool_call_id"] for body in before if body.get("part_kind") == "tool-return"}
    assert all(made[call] == 1 for call in completed)
    await _is_saved()
    await _check_facts(workers, events, made)


async def _check_facts(workers: Workers, events: list[dict[str, Any]], made: Counter[str]) -> None:
    """The facts have each request that the model got, and its tokens: as it reported them, or estimated."""
    run_id = events[0]["body"]["run_id"]
    async with Redis.from_url(workers.url) as client:
        run = await FactsOfRun.read(client, run_id)
    run.check(attempts=2)
    (resume,) = [event["body"] for event in events if event["type"] == "resume"]
    asked = sum(what.startswith("model") for _, what in workers.ledger.read())
    assert len(run.requests) in {asked, asked + (resume["void"] is not None)}  # the last one may not have arrived
    estimated = [node for node in run.requests if node.model and node.model.usage.source == "estimated"]
    assert [node.idx for node in estimated] == ([] if resume["void"] is None else [resume["void"]["idx"]])
    assert all(node.outcome == "lost" and node.model and node.model.usage.input > 0 for node in estimated)
    reported = [node.model.usage for node in run.requests if node.model and node not in estimated]
    session = agx.RedisSession("acme", "ada", "s")
    await session.load()
    billed = [message.usage for message in session.msgs if isinstance(message, ModelResponse)]
    assert sum(usage.input for usage in reported) == sum(usage.input_tokens for usage in billed)
    assert sum(usage.output for usage in reported) == sum(usage.output_tokens for usage in billed)
    assert {usage.source for usage in reported} == {"reported"}
    executed = Counter(fact.call_id for fact in run.of(ToolEnded))
    assert all(executed[f"{tool}{step}"] >= 1 for tool in TOOLS for step in range(STEPS))
    assert all(executed[call] >= count for call, count in made.items())


async def test_a_deploy_hands_runs_over_at_their_next_model_request(workers: Workers) -> None:
    await workers.start(2)
    following = asyncio.create_task(_submit())
    stopped = await workers.signal_who_has("slow 1", signal.SIGTERM)
    events = await following
    _check(events, workers.ledger, attempts=2)
    assert max(Counter(what for _, what in workers.ledger.read()).values()) == 1
    assert [event["body"]["void"] for event in events if event["type"] == "resume"] == [None]
    (process,) = [process for process in workers.processes if process.pid == stopped]
    assert await asyncio.to_thread(process.wait) == 0


async def test_a_worker_that_was_only_stopped_writes_nothing_more(workers: Workers) -> None:
    await workers.start(2)
    following = asyncio.create_task(_submit())
    pid = await workers.signal_who_has("model 1", signal.SIGSTOP)
    await wait_until(lambda: len({pid for pid, _ in workers.ledger.read()}) == 2)
    os.kill(pid, signal.SIGCONT)
    _check(await following, workers.ledger, attempts=2)
    await _is_saved()


async def _is_saved() -> None:
    session = agx.RedisSession("acme", "ada", "s")
    await session.load()
    assert session.get_user_prompt() == "Where is my order?"
    assert len(session.msgs) == 2 * (STEPS + 1)
    assert session.msgs[-1].text == "".join(WORDS)  # type: ignore[union-attr]


async def test_queued_prompts_and_a_message_survive_a_kill_and_a_restart_in_order(workers: Workers) -> None:
    await workers.start(1)
    questions = [f"Question {n}" for n in range(3)]
    for question in questions:
        await agx.submit("acme", "ada", "s", agent="support", prompt=question, on_busy="enqueue")
    await wait_until(lambda: "model 0" in [what for _, what in workers.ledger.read()])
    assert await agx.steer("acme", "ada", "s", "By tomorrow")
    await workers.signal_who_has("slow 1", signal.SIGKILL)
    await workers.start(1)
    session = agx.RedisSession("acme", "ada", "s")

    async def asked() -> list[str] | None:
        await session.load()
        found = prompts(session.msgs)
        return found if len(found) > len(questions) and isinstance(session.msgs[-1], ModelResponse) else None

    assert await wait_until(asked) == ["Question 0", "By tomorrow", *questions[1:]]
    await wait_until(is_over)


async def is_over() -> bool:
    return not await agx.is_live("acme", "ada", "s")
