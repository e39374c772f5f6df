"""Kills a worker with SIGKILL at a chosen step of a small run, has a second worker go on, and judges what came of it.

A step is a callback of the worker's event loop, which is what runs between two awaits, or a write to a socket: between
two steps nothing changes that another process could see. The steps of a whole process are counted, from its first look
at the queue until it has left.
"""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio import events, selector_events
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

import agx
from agx.jobs import submit

from .durable_worker import LEASE_TTL, TOOLS, Ledger, make_agent, make_recipe
from .forked import Forked
from .waiting import wait_until

STEPS, WORDS, PAUSE = 1, ("one ", "two ", "three"), 0.01
_SCOPE, _USER = "acme", "ada"
_AT_ONCE = 6  # processes that are to be killed


@dataclass
class Steps:
    """The steps of this process, and at which one it is killed; at none with 0."""

    kill_at: int
    taken: int = 0

    def count(self) -> None:
        """Count every step from now on."""
        handle: Any = events.Handle
        transport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
        run, write = handle._run, transport.write

        def counted_run(callback: Any) -> None:
            self._take()
            run(callback)

        def counted_write(connection: Any, data: Any) -> None:
            self._take()
            write(connection, data)

        handle._run, transport.write = counted_run, counted_write

    def _take(self) -> None:
        self.taken += 1
        if self.taken == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class KilledRun:
    """One run, at which step its worker is to be killed, and what was seen of it."""

    kill_at: int
    home: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    was_killed: bool = False

    @property
    def name(self) -> str:
        return f"kill-{self.kill_at}"

    @property
    def ledger(self) -> Path:
        return self.home / f"{self.name}.ledger"

    @property
    def count(self) -> Path:
        """The file in which a worker that was not killed leaves the number of its steps."""
        return self.home / f"{self.name}.steps"


async def count_steps(url: str, home: Path) -> int:
    """Return how many steps a worker takes that runs one job and leaves; agx is configured by the caller."""
    run = KilledRun(0, home)
    await play(url, [run])
    return int(run.count.read_text())


async def play(url: str, runs: Sequence[KilledRun]) -> None:
    """Have each run's worker killed, one worker go on with all of them, and every run followed to its end."""
    at_once = asyncio.Semaphore(_AT_ONCE)
    following = [asyncio.create_task(_follow(run)) for run in runs]
    try:
        await asyncio.gather(*(_kill(url, run, task, at_once) for run, task in zip(runs, following, strict=True)))
        served = [(run.name, run.ledger) for run in runs]
        rescuer = Forked(_rescue, url, served, log=runs[0].home / "rescuer.log")
        await asyncio.gather(*following)
        await asyncio.to_thread(rescuer.end)
    finally:
        for task in following:
            task.cancel()


async def _follow(run: KilledRun) -> None:
    async for event in agx.listen(_SCOPE, _USER, run.name, serialize=False, wait=60, timeout=60):
        run.events.append(event)


async def _kill(url: str, run: KilledRun, following: asyncio.Task[None], at_once: asyncio.Semaphore) -> None:
    async with at_once:
        await agx.submit(_SCOPE, _USER, run.name, agent=run.name, prompt="hello")
        process = Forked(_work, url, run, log=run.home / f"{run.name}.log")
        await wait_until(lambda: following.done() or process.ended)
        await asyncio.to_thread(process.end)
        run.was_killed = process.was_killed


def _work(url: str, run: KilledRun) -> None:
    steps = Steps(run.kill_at)
    steps.count()
    asyncio.run(_serve(url, [(run.name, run.ledger)]))
    run.count.write_text(str(steps.taken))


def _rescue(url: str, served: Sequence[tuple[str, Path]]) -> None:
    submit.CLAIM_TTL = LEASE_TTL  # all that have claimed a job are dead
    asyncio.run(_serve(url, served))


async def _serve(url: str, served: Iterable[tuple[str, Path]]) -> None:
    recipes = {
        name: make_recipe(make_agent(Ledger(ledger), steps=STEPS, words=WORDS, pause=PAUSE)) for name, ledger in served
    }
    async with Redis.from_url(url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE_TTL, retention=60))
        await agx.Worker(recipes).run()
        await agx.aclose()


async def wrongs(run: KilledRun) -> list[str]:
    """Return what is wrong with a run that was followed to its end."""
    found = [*_wrong_events(run), *_wrong_calls(run)]
    session = agx.RedisSession(_SCOPE, _USER, run.name)
    await session.load()
    saved = session.msgs[-1].text if session.msgs else None  # type: ignore[union-attr]
    if len(session.msgs) != 2 * (STEPS + 1) or saved != "".join(WORDS):
        found.append(f"{len(session.msgs)} messages saved, the last one is {saved!r}")
    return [f"killed at step {run.kill_at}: {wrong}" for wrong in found]


def _wrong_events(run: KilledRun) -> Iterable[str]:
    bodies = [event["body"] for event in run.events]
    seqs = [body["seq"] for body in bodies]
    if seqs != list(range(len(bodies))):
        yield f"seq has a gap or repeats: {seqs}"
    types = [event["type"] for event in run.events]
    if types.count("begin") != 1 or types.count("end") != 1 or types[-1] != "end":
        yield f"not one begin and one end: {types}"
        return
    if bodies[-1]["outcome"] != "completed":
        yield f"{bodies[-1]['outcome']}"
    returns = Counter(body["tool_call_id"] for body in bodies if body.get("part_kind") == "tool-return")
    if returns != {f"{tool}{step}": 1 for tool in TOOLS for step in range(STEPS)}:
        yield f"tool results: {returns}"
    resumes = [event["body"] for event in run.events if event["type"] == "resume"]
    if len(resumes) > run.was_killed:
        yield f"resumed {len(resumes)} times"
    void = {body["void"]["idx"] for body in resumes if body["void"] is not None}
    text = "".join(
        body.get("content", "") + body.get("content_delta", "")
        for body in bodies
        if body.get("part_kind") == "text" and body["idx"] not in void
    )
    if text != "".join(WORDS):
        yield f"the text is {text!r}"


def _wrong_calls(run: KilledRun) -> Iterable[str]:
    made = Counter(what.replace(" ", "") for _, what in Ledger(run.ledger).read())
    types = [event["type"] for event in run.events]
    before = run.events[: types.index("resume") if "resume" in types else len(types)]
    completed = {
        event["body"].get("tool_call_id") for event in before if event["body"].get("part_kind") == "tool-return"
    }
    for step in range(STEPS):
        for tool in TOOLS:
            call = f"{tool}{step}"
            # `slow` is made again where its result was not recorded; `quick` is never made again.
            most = 2 if tool == "slow" and call not in completed else 1
            if made[call] > most:
                yield f"{call} was made {made[call]} times"
