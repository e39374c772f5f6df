"""The verdict on a scene: what was heard, facts, metrics and spans held against each other and against the plans."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException

from redis.asyncio import Redis, RedisCluster
from support.leaks import lasting_keys
from support.recorded import read_facts

from agx.facts import schema as facts
from agx.redis import keys

from .clients import open_client
from .plan import plan_of
from .traced import doubled_spans, missing_spans, repeated_spans
from .witness import Heard
from .world import World

PARTITIONS = 8
LEAST_CARE = 3.0  # seconds after the lease; the goal for how long a dead run's listeners wait
SETTLE = 30.0  # seconds within which everything has to be told


@dataclass
class Verdict:
    """The row of one scene, and what broke a promise in it."""

    name: str
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    unavailable: int = 0  # runs that could not be started, and said so
    lost: int = 0
    repeated: int = 0
    hung: int = 0
    spans_missing: int = 0
    facts_missed: int = 0
    times: list[str] = field(default_factory=list)  # what was measured
    broken: list[str] = field(default_factory=list)

    @property
    def runs(self) -> int:
        return self.outcomes.total()


def judge_runs(verdict: Verdict, world: World, *, may_cancel: bool) -> list[Heard]:
    """Judge what the listeners heard; returns the runs that began."""
    begun = []
    for one in world.witness.heard.values():
        verdict.lost += one.lost
        verdict.repeated += one.repeated
        if one.lost or one.repeated:
            verdict.broken.append(f"{one.session}: {one.lost} events lost, {one.repeated} repeated")
        refused = any(note.startswith("unavailable") for note in one.noted)
        if one.hangs and (one.begun or not refused):
            verdict.hung += 1
            verdict.broken.append(f"{one.session}: its listener hangs after {len(one.seqs)} events, noted {one.noted}")
        # Its `begin` may have been appended all the same, and only the reply not have come: then a sidecar closes it.
        verdict.unavailable += refused
        if not one.begun or (refused and one.outcome != "lost"):
            continue
        begun.append(one)
        verdict.outcomes[one.outcome or "none"] += 1
        verdict.broken += [f"{one.session}: {wrong}" for wrong in _wrongs(one, world.mortal, may_cancel=may_cancel)]
    verdict.times += _freed(world, begun)
    return begun


def _freed(world: World, begun: Iterable[Heard]) -> list[str]:
    """How long after its service was killed the listener of a lost run was told."""
    killed = [(one.ended_at, world.killed_at.get(one.worker)) for one in begun if one.outcome == "lost"]
    # A service that was killed may have been stalled before: what it lost then is another matter.
    waits = sorted(end - at for end, at in killed if end is not None and at is not None and end > at)
    if not waits:
        return []
    most = world.lease_ttl + LEAST_CARE
    late = sum(wait > most for wait in waits)
    took = f"p50 {waits[len(waits) // 2]:.1f} s, max {waits[-1]:.1f} s"
    return [f"{len(waits)} listeners of killed services freed after {took}; {late} later than {most:.0f} s"]


def _wrongs(one: Heard, mortal: set[str], *, may_cancel: bool) -> Iterable[str]:
    if one.unended:
        yield "nobody closed it"
    if one.outcome == "completed" and one.text != plan_of(one.session).text:
        yield f"its text is not whole: {len(one.text)} of {len(plan_of(one.session).text)} characters"
    refused = any(note.startswith("unavailable") for note in one.noted)
    if one.outcome == "lost" and one.worker not in mortal and not refused:
        yield "declared lost though its process lived"
    if one.outcome == "cancelled" and not may_cancel:
        yield "cancelled, and nobody had asked for it"
    if one.outcome == "failed":
        yield "failed"
    for note in one.noted:
        word = note.split()[0]
        if word in ("failed", "wrong", "unsaved"):
            yield note
        elif word == "fenced" and one.outcome != "lost":
            yield f"fenced, but {one.outcome}"
        elif word in ("completed", "cancelled") and one.outcome != word:
            yield f"{word} for its process, {one.outcome} for its listener"


async def judge_told(verdict: Verdict, world: World, begun: list[Heard], *, spans_once: bool) -> None:
    """Judge facts, metrics and spans, once they agree or SETTLE seconds have passed."""
    client = open_client(world.url)
    try:
        deadline = time.monotonic() + SETTLE
        while True:
            missed = await _missed_facts(client, begun)
            missed += await asyncio.to_thread(wrong_metrics, world, begun)
            all_facts = await _read_facts(client)
            spans = missing_spans(world, all_facts)
            doubled = doubled_spans(world, all_facts, once=spans_once)
            left = await left_over(client, world)
            if not (missed or spans or doubled or left) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.3)
    finally:
        await client.aclose()
    if again := repeated_spans(world):
        verdict.times.append(again)
    verdict.facts_missed, verdict.spans_missing = len(missed), len(spans)
    verdict.broken += missed + spans + doubled + left


async def _read_facts(client: Redis | RedisCluster) -> dict[str, facts.Fact]:
    return {fact.id: fact for fact in await read_facts(client)}  # type: ignore[arg-type] # a cluster's client will do


async def _missed_facts(client: Redis | RedisCluster, begun: list[Heard]) -> list[str]:
    told = await _read_facts(client)
    by_run: dict[str, list[facts.Fact]] = defaultdict(list)
    for fact in told.values():
        if not isinstance(fact, facts.ProcessState):
            by_run[fact.run_id].append(fact)
    missed = []
    for one in begun:
        assert one.run_id is not None
        of = by_run[one.run_id]
        ends = [fact for fact in of if isinstance(fact, facts.RunEnded)]
        if not any(isinstance(fact, facts.RunStarted) for fact in of):
            missed.append(f"{one.session}: no run.start")
        if [fact.outcome for fact in ends] != [one.outcome]:
            missed.append(f"{one.session}: {one.outcome}, but run.end says {[fact.outcome for fact in ends]}")
        calls = sum(isinstance(fact, facts.NodeEnded) and fact.model is not None for fact in of)
        tools = sum(isinstance(fact, facts.ToolEnded) for fact in of)
        plan = plan_of(one.session)
        if one.outcome == "completed" and (calls, tools) != (plan.model_calls, int(plan.calls_tool)):
            missed.append(f"{one.session}: {calls} model calls and {tools} tool calls told of {plan}")
    return missed


def wrong_metrics(world: World, begun: Sequence[Heard]) -> list[str]:
    """Compare the leader's counters with what the listeners heard."""
    outcomes = Counter(one.outcome for one in begun)
    for sidecar in world.sidecars:
        try:
            if not sidecar.leads():
                continue
            scraped = sidecar.scrape()
        except (AssertionError, OSError, HTTPException):
            continue
        counted = {outcome: scraped.total("agx_runs_total", outcome=str(outcome)) for outcome in outcomes}
        counted[None] = scraped.total("agx_runs_started_total")
        truth: dict[str | None, int] = {**outcomes, None: len(begun)}
        return [f"metrics: {counted[what]} of {what or 'all begun'}, truth {truth[what]}" for what in truth
                if counted[what] != truth[what]]  # fmt: skip
    return ["metrics: no sidecar leads"]


async def left_over(client: Redis | RedisCluster, world: World) -> list[str]:
    """Return what a scene has left in Redis and should not."""
    members = [await client.zrange(keys.leases("agx", n), 0, -1) for n in range(PARTITIONS)]
    left = [f"leases left: {members}"] if any(members) else []
    for admin in world.admins():
        with admin:
            if lasting := await asyncio.to_thread(lasting_keys, admin):
                left.append(f"keys without a TTL: {lasting}")
    return left
