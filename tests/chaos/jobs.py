"""The jobs of a scene of durable runs: submits them, follows each one, and keeps what was seen of it.

A job is five steps long: four model requests with two parallel tools each, then a text. `quick` is interrupted by the
death of its worker, `slow` is made again. Every model request and tool call is a line of the job's ledger.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from support.agents import ScopeDeps
from support.durable_worker import Ledger, make_agent, make_recipe

import agx

from .clients import open_client
from .plan import scope_of
from .witness import Heard, Witness
from .worker import SERVICE, USER

TOOL_STEPS = 4
WORDS = tuple(f"word{n} " for n in range(20))
AGENT, POISON = "support", "poison"
MOST_FACTS = 1_000_000  # in the queues: the verdict reads all of them
_FOLLOWED = 120.0  # seconds without an event after which a listener gives up
_PAUSE_AFTER_FAILURE = 0.3  # seconds before a submit is tried again


@dataclass(slots=True)
class Job(Heard):
    """A job and what its listener got."""

    agent: str = AGENT
    events: list[dict[str, Any]] = field(default_factory=list)


class Jobs(Witness):
    """Keeps a number of jobs under way until `stop_submitting()`.

    Args:
        ledgers: directory of the jobs' ledgers.
    """

    def __init__(self, ledgers: Path) -> None:
        super().__init__(ledgers)
        self.under_way = 0  # jobs at a time; set by the scene
        self.most = 10**9  # jobs in all
        self.refused = 0  # submits that Redis did not answer
        self._submitting = True

    async def _look(self) -> None:
        names = (f"job-{n}" for n in range(10**9))
        while True:
            if self._submitting and len(self.open_jobs()) < self.under_way and len(self.heard) < self.most:
                await self.submit(Job(next(names)))
            else:
                await asyncio.sleep(0.01)

    async def submit(self, job: Job) -> None:
        """Submit a job until Redis takes it, under one id, and follow it."""
        self.heard[job.session] = job
        job.task = asyncio.create_task(self._listen(job))
        scope = scope_of(job.session)
        while True:
            try:
                await agx.submit(scope, USER, job.session, agent=job.agent, prompt="Go", run_id=job.session, recover=60)
            except agx.RedisUnavailableError:
                self.refused += 1
                await asyncio.sleep(_PAUSE_AFTER_FAILURE)
            except agx.SessionBusyError:
                return  # the submit before was taken, and only its reply was lost
            else:
                return

    async def _listen(self, heard: Heard) -> None:
        assert isinstance(heard, Job)
        listener = agx.listen(
            scope_of(heard.session), USER, heard.session, wait=_FOLLOWED, timeout=_FOLLOWED, serialize=False
        )
        async for event in listener:
            body = event["body"]
            heard.events.append(event)
            if "seq" in body:
                heard.seqs.append(body["seq"])
            if event["type"] == "begin":
                heard.run_id = body["run_id"]
            elif event["type"] == "end":
                heard.outcome = body["outcome"]
            elif body.get("gap"):
                heard.gaps += 1
        heard.unended = heard.outcome is None
        heard.ended_at = time.monotonic()

    def open_jobs(self) -> list[Heard]:
        """Return the jobs whose listener follows them still."""
        return [job for job in self.heard.values() if job.hangs]

    def stop_submitting(self) -> None:
        """Submit nothing more."""
        self._submitting = False

    async def settle(self, seconds: float) -> None:
        """Wait until every listener has got the end of its run, at most so long."""
        tasks = [job.task for job in self.open_jobs() if job.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def ledger(self, job: Heard) -> Ledger:
        return Ledger(self.directory / job.session)


def serve(url: str, ledgers: Path, lease_ttl: float, at_once: int, grace: float) -> None:
    """Work on jobs until SIGTERM."""
    asyncio.run(_serve(url, ledgers, lease_ttl, at_once, grace))


async def _serve(url: str, ledgers: Path, lease_ttl: float, at_once: int, grace: float) -> None:
    async def make_support(job: agx.Job) -> agx.Call:
        agent = make_agent(Ledger(ledgers / job.session_id), steps=TOOL_STEPS, words=WORDS, pause=0.01)
        return await make_recipe(agent)(job)

    client = open_client(url)
    agx.configure(agx.Config(redis=client, lease_ttl=lease_ttl, service_name=SERVICE, queue_max_length=MOST_FACTS))
    recipes = {AGENT: make_support, POISON: make_recipe(_make_poison())}
    await agx.Worker(recipes, at_once, grace=grace).run()
    await agx.aclose()
    await client.aclose()


def _make_poison() -> Agent[ScopeDeps, str]:
    """Return an agent that kills its worker as soon as it asks its model."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        await asyncio.sleep(0.1)  # its request is recorded by then
        os.kill(os.getpid(), signal.SIGKILL)
        yield ""

    return Agent(FunctionModel(stream_function=answer), deps_type=ScopeDeps, name=POISON)
