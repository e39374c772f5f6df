"""The verdict on a scene of durable runs: listeners, ledgers, facts and metrics held against each other."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from pydantic_ai.messages import ModelResponse
from support.durable_worker import TOOLS
from support.recorded import read_facts

import agx
from agx.facts import schema as facts

from .clients import open_client
from .jobs import AGENT, TOOL_STEPS, WORDS, Job, Jobs
from .plan import scope_of
from .traced import doubled_spans, missing_spans, repeated_spans
from .verdict import SETTLE, Verdict, left_over, wrong_metrics
from .worker import USER
from .world import World

_LEAST_COMPLETE = 0.99


async def judge_durable(
    verdict: Verdict,
    world: World,
    jobs: Jobs,
    *,
    died_ms: Mapping[int, float],
    max_takeover: float | None,
    max_pause: float | None,
    spans_once: bool,
    may_lose_jobs: bool,
) -> None:
    """Judge every job, then facts, metrics and spans once they agree or SETTLE seconds have passed.

    Args:
        died_ms: when workers were killed, by pid: ms since the epoch.
        max_takeover: seconds from a kill to the takeover, at p95; None sets no bound.
        max_pause: seconds between two events of a run that is taken over, at p95; None sets no bound.
        spans_once: no span may be exported twice.
        may_lose_jobs: a primary is lost with what it had not replicated: jobs that had not begun, too.
    """
    begun: list[Job] = []
    takeovers: list[float] = []
    pauses: list[float] = []
    for job in jobs.heard.values():
        assert isinstance(job, Job)
        if may_lose_jobs and not job.begun:
            jobs.refused += 1
            continue
        verdict.outcomes[job.outcome or "none"] += 1
        verdict.lost += job.lost
        verdict.repeated += job.repeated
        verdict.hung += job.hangs
        verdict.broken += [f"{job.session}: {wrong}" for wrong in _wrongs(job, jobs)]
        takeovers += _takeovers(job, jobs, died_ms)
        pauses += _pauses(job)
        if job.begun:
            begun.append(job)
    good = [job for job in begun if job.agent == AGENT]
    completed = sum(job.outcome == "completed" for job in good)
    expected = sum(isinstance(job, Job) and job.agent == AGENT for job in jobs.heard.values())
    if completed < _LEAST_COMPLETE * (len(good) if may_lose_jobs else expected):
        verdict.broken.append(f"only {completed} complete")
    verdict.unavailable = jobs.refused
    verdict.times.append(f"{sum(map(len, map(_resumes, begun)))} takeovers")
    verdict.times += _judge_times(verdict, "taken over after a kill", takeovers, max_takeover)
    verdict.times += _judge_times(verdict, "pause", pauses, max_pause)
    await _judge_counts(verdict, world, jobs, begun, spans_once=spans_once)


def _judge_times(verdict: Verdict, what: str, seconds: list[float], most: float | None) -> list[str]:
    if not seconds:
        return []
    seconds = sorted(seconds)
    p95 = seconds[int(len(seconds) * 0.95)]
    if most is not None and p95 > most:
        verdict.broken.append(f"{what}: p95 {p95:.1f} s, at most {most:g} s")
    return [f"{what}: p50 {seconds[len(seconds) // 2]:.2f} s, p95 {p95:.2f} s, max {seconds[-1]:.2f} s"]


def _resumes(job: Job) -> list[int]:
    """Return the positions of the job's `resume` events."""
    return [n for n, event in enumerate(job.events) if event["type"] == "resume"]


def _ms(event: dict[str, object]) -> int:
    """Return the server's time of an event."""
    return int(str(event["id"]).split("-")[0])


def _wrongs(job: Job, jobs: Jobs) -> Iterable[str]:
    if job.hangs or job.unended:
        yield f"its listener got no end after {len(job.events)} events"
        return
    if job.lost or job.repeated:
        yield f"{job.lost} events lost, {job.repeated} repeated"
    types = [event["type"] for event in job.events]
    if types.count("begin") != 1 or types.count("end") != 1:
        yield f"{types.count('begin')} begins and {types.count('end')} ends"
    if job.agent != AGENT:
        if job.outcome != "lost":
            yield f"the poison job is {job.outcome}"
        return
    if job.outcome != "completed":
        yield f"{job.outcome} after {len(_resumes(job)) + 1} attempts"
        return
    bodies = [event["body"] for event in job.events]
    void = {body["void"]["idx"] for n in _resumes(job) if (body := bodies[n])["void"] is not None}
    text = "".join(
        body.get("content", "") + body.get("content_delta", "")
        for body in bodies
        if body.get("part_kind") == "text" and body["idx"] not in void
    )
    if text != "".join(WORDS):
        yield f"its text is {text!r}"
    yield from _wrong_calls(job, jobs)


def _wrong_calls(job: Job, jobs: Jobs) -> Iterable[str]:
    """Hold the ledger, which is outside the workers, against the recorded results."""
    returned: Counter[str] = Counter()
    recorded_by: dict[str, int] = {}  # the takeover, its ms, at which a call was known to be completed
    completed: set[str] = set()
    for event in job.events:
        if event["type"] == "resume":
            recorded_by |= {call: _ms(event) for call in completed - recorded_by.keys()}
        elif event["body"].get("part_kind") == "tool-return":
            completed.add(event["body"]["tool_call_id"])
            returned[event["body"]["tool_call_id"]] += 1
    if returned != {f"{tool}{step}": 1 for tool in TOOLS for step in range(TOOL_STEPS)}:
        yield f"its tool results: {dict(returned)}"
    made: Counter[str] = Counter()
    for _, what, ms in jobs.ledger(job).read_times():
        call = what.replace(" ", "")
        made[call] += 1
        if call in recorded_by and ms > recorded_by[call]:
            yield f"{call} was made again though its result was recorded"
        if call.startswith("quick") and made[call] > 1:
            yield f"{call} was interrupted and made again"


def _takeovers(job: Job, jobs: Jobs, died_ms: Mapping[int, float]) -> Iterable[float]:
    """Yield how long after the death of its worker another one went on with the run: seconds."""
    lines = jobs.ledger(job).read_times()
    for n in _resumes(job):
        at = _ms(job.events[n])
        before = [pid for pid, _, ms in lines if ms < at]
        if before and died_ms.get(before[-1], at) < at:
            yield (at - died_ms[before[-1]]) / 1_000


def _pauses(job: Job) -> Iterable[float]:
    """Yield the seconds between the last event of an attempt and the next attempt."""
    resumes = set(_resumes(job))
    for n, (before, after) in enumerate(pairwise(job.events), start=1):
        if n in resumes:
            yield (_ms(after) - _ms(before)) / 1_000


async def _judge_counts(verdict: Verdict, world: World, jobs: Jobs, begun: list[Job], *, spans_once: bool) -> None:
    client = open_client(world.url)
    good = [job for job in begun if job.agent == AGENT and job.outcome == "completed"]
    billed = {job.session: await _read_usage(job) for job in good}
    try:
        deadline = time.monotonic() + SETTLE
        while True:
            queued = {fact.id: fact for fact in await read_facts(client)}  # type: ignore[arg-type] # a cluster's will do
            missed = _wrong_facts(begun, queued)
            missed += [f"{job.session}: {wrong}" for job in good for wrong in _wrong_tokens(job, jobs, queued, billed)]
            missed += await asyncio.to_thread(wrong_metrics, world, begun)
            left = await left_over(client, world)
            missing = missing_spans(world, queued)
            doubled = doubled_spans(world, queued, once=spans_once)
            if not (missed or left or missing or doubled) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.3)
    finally:
        await client.aclose()
    if again := repeated_spans(world):
        verdict.times.append(again)
    verdict.facts_missed, verdict.spans_missing = len(missed), len(missing)
    verdict.broken += missed + left + missing + doubled


def _wrong_facts(begun: list[Job], queued: Mapping[str, facts.Fact]) -> list[str]:
    """Compare each run with its facts: started and ended once, each id once."""
    started: Counter[str] = Counter()
    ended: dict[str, set[str]] = {}
    for fact in queued.values():
        if isinstance(fact, facts.RunStarted):
            started[fact.run_id] += 1
        elif isinstance(fact, facts.RunEnded):
            ended.setdefault(fact.run_id, set()).add(fact.outcome)
    wrong = []
    for job in begun:
        run_id = str(job.run_id)
        if (started[run_id], ended.get(run_id)) != (1, {job.outcome}):
            wrong.append(f"{job.session}: {job.outcome}, started {started[run_id]}, ended {ended.get(run_id)}")
    return wrong


async def _read_usage(job: Job) -> Counter[tuple[int, int]]:
    """Return the input and output tokens that the model reported of each answer in the stored conversation."""
    session = agx.RedisSession(scope_of(job.session), USER, job.session)
    await session.load()
    answers = [message.usage for message in session.msgs if isinstance(message, ModelResponse)]
    return Counter((usage.input_tokens, usage.output_tokens) for usage in answers)


def _wrong_tokens(
    job: Job, jobs: Jobs, queued: Mapping[str, facts.Fact], billed: Mapping[str, Counter[tuple[int, int]]]
) -> Iterable[str]:
    """Hold the facts of a run's model requests against the model's ledger, and their tokens against its answers."""
    usages = [
        fact.model.usage
        for fact in queued.values()
        if isinstance(fact, facts.NodeEnded) and fact.run_id == job.run_id and fact.model is not None
    ]
    asked = sum(what.startswith("model ") for _, what, _ in jobs.ledger(job).read_times())
    interrupted = sum(job.events[n]["body"]["void"] is not None for n in _resumes(job))
    # A request is recorded when it is sent: of each attempt, the last one may have been recorded only, or sent only.
    if not asked - len(_resumes(job)) <= len(usages) <= asked + interrupted:
        yield f"{len(usages)} model requests are recorded, and the model got {asked}"
    if any(usage.source == "missing" or usage.input == 0 for usage in usages):
        yield "a model request has no tokens"
    reported = Counter((usage.input, usage.output) for usage in usages if usage.source == "reported")
    if (billed[job.session] - reported) or (reported - billed[job.session]).total() > interrupted:
        yield f"tokens recorded: {dict(reported)}, of the answers: {dict(billed[job.session])}"
