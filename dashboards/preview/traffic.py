"""Traffic of every kind and outcome, written as facts into the scope queues of a real server."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from redis import Redis

from agx.facts.schema import (
    APPEND_BUCKETS,
    CHUNK_BUCKETS,
    FIELD,
    FORMAT,
    ApprovalDecided,
    Fact,
    ModelCall,
    NodeEnded,
    Outcome,
    ProcessState,
    Reason,
    RunEnded,
    RunFeedback,
    RunResumed,
    RunStarted,
    RunSteered,
    Service,
    StreamTotals,
    ToolEnded,
    ToolOutcome,
    Trace,
    Usage,
    UsageSource,
    encode,
)
from agx.redis import keys

T = TypeVar("T")

PREFIX = "agx"
PARTITIONS = 8
SECOND = 1_000_000_000
SCOPES = ("acme", "globex", "initech")
WEB, JOBS = Service("web", "1.4.0", "web-0"), Service("jobs", "1.4.0", "jobs-0")


@dataclass(frozen=True, slots=True)
class Kind:
    """One agent as it behaves: its model, its tools, and how long a model request takes (median, seconds)."""

    agent: str
    provider: str
    model: str
    tools: tuple[str, ...]
    seconds: float
    per_tick: float


AGENTS = (
    Kind("support", "openai", "gpt-4o-mini", ("search_orders", "refund"), 1.5, 4.0),
    Kind("research", "anthropic", "claude-sonnet-4-5", ("web_search", "read_page"), 5.0, 2.0),
    Kind("triage", "in-house", "in-house-7b", ("classify",), 0.4, 3.0),
)
OUTCOMES: tuple[tuple[Outcome, float], ...] = (
    ("completed", 0.87),
    ("cancelled", 0.08),
    ("failed", 0.04),
    ("lost", 0.01),
)
REASONS: tuple[Reason, ...] = ("cancel", "cancel", "cancel", "task", "shutdown", "lease_deleted", "abandoned")
ERRORS = ("ModelHTTPError", "UnexpectedModelBehavior", "TimeoutError")
TOOL_OUTCOMES: tuple[tuple[ToolOutcome, float], ...] = (
    ("ok", 0.84),
    ("retry", 0.05),
    ("error", 0.05),
    ("cancelled", 0.02),
    ("denied", 0.02),
    ("deferred", 0.02),
)


class Traffic:
    """Facts of a small fleet; `tick()` writes those of about a second."""

    def __init__(self, url: str, *, seed: int = 7) -> None:
        self._redis = Redis.from_url(url)
        self._random = random.Random(seed)
        self._number = 0
        self._lives: dict[str, int] = {}
        meta: dict[Any, Any] = {"format": FORMAT, "partitions": PARTITIONS, "lease_ttl": 15}
        self._redis.hset(keys.meta(PREFIX), mapping=meta)
        self._redis.expire(keys.meta(PREFIX), keys.INDEX_TTL)

    def tick(self) -> None:
        """Write a second's facts; every agent ends at least one run of each outcome every few ticks."""
        now = time.time_ns()
        with self._redis.pipeline(transaction=False) as pipeline:
            for kind in AGENTS:
                for _ in range(self._count(kind.per_tick)):
                    scope = self._random.choices(SCOPES, (5, 3, 1))[0]
                    for fact in self._run(kind, scope, now):
                        self._put(pipeline, scope, fact)
            for service in (WEB, JOBS):
                self._put(pipeline, service.name, self._heartbeat(service, now))
            self._live(pipeline)
            pipeline.execute()

    def close(self) -> None:
        """Close the connection and take the made-up leases and what waits away: they belong to no process."""
        for n in range(PARTITIONS):
            self._redis.delete(*self._waiting_keys(n))
        self._redis.close()

    def _put(self, pipeline: Redis, tenant: str, fact: Fact) -> None:
        key = keys.queue(PREFIX, keys.partition(tenant, PARTITIONS))
        pipeline.xadd(key, {FIELD: encode(fact)}, maxlen=100_000 // PARTITIONS)
        pipeline.expire(key, keys.QUEUE_TTL)

    def _live(self, pipeline: Redis) -> None:
        """Leases as live runs have them, and as many jobs and approvals that wait; their number varies.

        Deadlines are far off, so that no reaper has to look after them.
        """
        for scope, most in zip(SCOPES, (12, 7, 3), strict=True):
            self._lives[scope] = min(most, max(1, self._lives.get(scope, most // 2) + self._random.randint(-1, 1)))
            pipeline.delete(*self._waiting_keys(keys.partition(scope, PARTITIONS)))
        for scope, lives in self._lives.items():
            leases, jobs, approvals = self._waiting_keys(keys.partition(scope, PARTITIONS))
            deadline = (time.time() + 600) * 1000
            sessions = [f"{scope}:user:session-{n}" for n in range(lives)]
            pipeline.zadd(leases, {f"{session}:run": deadline for session in sessions})
            pipeline.hset(approvals, mapping={f"c:{session}:call": "{}" for session in sessions})
            for _ in sessions:
                pipeline.xadd(jobs, {"scope": scope, "due": 0})
            for key in (leases, jobs, approvals):
                pipeline.expire(key, keys.INDEX_TTL)

    def _waiting_keys(self, n: int) -> tuple[str, str, str]:
        return keys.leases(PREFIX, n), keys.jobs(PREFIX, n), keys.approvals(PREFIX, n)

    def _run(self, kind: Kind, scope: str, now: int) -> Iterator[Fact]:
        self._number += 1
        run_id, outcome = f"run-{self._number}", self._choose(OUTCOMES)
        trace_id = f"{self._random.getrandbits(128):032x}"

        def about(what: str) -> dict[str, object]:
            span, parent = f"{self._random.getrandbits(64):016x}", None if what == "run" else f"{self._number:016x}"
            return {
                "id": f"{run_id}/{what}",
                "scope": scope,
                "user": "user",
                "session": f"session-{self._number % 50}",
                "run_id": run_id,
                "agent": kind.agent,
                "service": WEB if kind.agent == "support" else JOBS,
                "trace": Trace(trace_id, span, parent, sampled=self._number % 5 == 0, sdk=False),
            }

        durations = [self._spread(kind.seconds) for _ in range(1 + self._count(1.2 if kind.tools else 0))]
        requests = len(durations)
        start = now - round(sum(durations) * 1.2 * SECOND)
        yield from self._begin(about, start)
        tools, at = 0, start
        for idx, seconds in enumerate(durations):
            last = idx == requests - 1
            end = at + round(seconds * SECOND)
            ended = outcome if last else "completed"
            error = self._random.choice(ERRORS) if ended == "failed" else "LostError" if ended == "lost" else None
            yield NodeEnded(
                **about(f"node-{idx}"),  # type: ignore[arg-type]
                node="model_request",
                idx=idx,
                outcome=ended,
                start_ns=at,
                end_ns=end,
                error_type=error,
                model=self._call(kind, at, end, ended),
            )
            at = end
            if not last:
                tools += 1
                yield from self._tool_node(kind, idx, at, about)
                at += SECOND // 10
        cancelled = outcome == "cancelled"
        yield RunEnded(
            **about("run"),  # type: ignore[arg-type]
            outcome=outcome,
            reason=self._random.choice(REASONS) if cancelled else None,
            stage=self._random.choice(("model_request", "model_request", "call_tools")) if cancelled else None,
            start_ns=start,
            end_ns=at,
            error_type={"failed": self._random.choice(ERRORS), "lost": "LostError"}.get(outcome),
            cancel_ms=at // 1_000_000 - round(self._spread(0.03) * 1000) if cancelled else None,
            end_ms=at // 1_000_000 if cancelled else None,
            model_calls=requests,
            tool_calls=tools,
            first_text_ns=(at - start) * 4 // 10,
            stream=StreamTotals(requests * 60, requests * 9_000, int(self._random.random() < 0.05), 0),
        )
        if self._random.random() < 0.2:
            yield from self._asked_of(about, kind, at)

    def _asked_of(self, about: Callable[[str], dict[str, object]], kind: Kind, at: int) -> Iterator[Fact]:
        """Yield what others asked of a run: a message, a score, a decision on a tool call."""
        score = float(self._random.random() < 0.8)
        yield RunSteered(**about("steer"), at_ns=at, outcome="delivered" if score else "stored")  # type: ignore[arg-type]
        yield RunFeedback(**about("feedback"), at_ns=at, name="thumb", value=score, model=kind.model)  # type: ignore[arg-type]
        waits = {"start_ns": at - round(self._spread(60) * SECOND), "end_ns": at}
        decided = about("decided") | waits | {"decision": "approved" if score else "denied"}
        yield ApprovalDecided(**decided)  # type: ignore[arg-type]

    def _begin(self, about: Callable[[str], dict[str, object]], start: int) -> Iterator[Fact]:
        waited = round(self._spread(0.3) * SECOND)  # all runs are jobs
        yield RunStarted(**about("start"), start_ns=start, waited_ns=waited)  # type: ignore[arg-type]
        if self._random.random() < 0.1:
            dead = round(self._spread(5) * SECOND)
            resumed = about("resume") | {"attempt": 2, "last_ns": start - dead, "at_ns": start}
            yield RunResumed(**resumed)  # type: ignore[arg-type]

    def _tool_node(self, kind: Kind, idx: int, at: int, about: Callable[[str], dict[str, object]]) -> Iterator[Fact]:
        end = at + round(self._spread(0.2) * SECOND)
        tool, outcome = self._random.choice(kind.tools), self._choose(TOOL_OUTCOMES)
        yield ToolEnded(
            **about(f"tool-{idx}"),  # type: ignore[arg-type]
            tool=tool,
            call_id=f"call-{idx}",
            idx=idx,
            outcome=outcome,
            start_ns=at,
            end_ns=end,
            error_type="ToolError" if outcome == "error" else None,
        )
        yield NodeEnded(
            **about(f"tools-{idx}"),  # type: ignore[arg-type]
            node="call_tools",
            idx=idx,
            outcome="completed",
            start_ns=at,
            end_ns=end,
        )

    def _call(self, kind: Kind, start: int, end: int, outcome: Outcome) -> ModelCall:
        chunks = [0] * (len(CHUNK_BUCKETS) + 1)
        for _ in range(30):
            chunks[self._random.choices((0, 1, 2, 3, 4), (8, 12, 6, 3, 1))[0]] += 1
        source: UsageSource = "reported" if outcome == "completed" else self._random.choice(("estimated", "missing"))
        prompt = round(self._spread(1_500))
        return ModelCall(
            start_ns=start,
            end_ns=end,
            provider=kind.provider,
            request_model=kind.model,
            response_model=kind.model,
            response_id="response",
            stream=True,
            finish_reason="stop" if outcome == "completed" else None,
            finish_reason_missing=False,
            first_chunk_ns=(end - start) * 3 // 10,
            chunk_counts=tuple(chunks),
            chunk_sum_ns=(end - start) * 7 // 10,
            usage=Usage(prompt, round(self._spread(250)), prompt // 3, prompt // 20, 40, source),
        )

    def _heartbeat(self, service: Service, now: int) -> ProcessState:
        self._number += 1
        # From the fastest on, two buckets an octave.
        weights = (20, 20, 30, 30, 10, 10, 4, 4, 2, 1, 0.5, 0.5, 0.2, 0.1)
        appends = tuple(self._count(weight) for weight in weights) + (0,) * (len(APPEND_BUCKETS) + 1 - len(weights))
        return ProcessState(
            id=f"heartbeat-{self._number}",
            at_ns=now,
            service=service,
            listeners=30 + self._count(10) if service is WEB else self._count(2),
            buffered_events=self._count(3),
            silence_ns=round(self._spread(4) * SECOND),
            gaps=int(self._random.random() < 0.2),
            rereads=self._count(0.3),
            append_counts=appends,
            append_sum_ns=sum(
                round(bound * SECOND) * n for bound, n in zip((*APPEND_BUCKETS, 10), appends, strict=True)
            ),
        )

    def _choose(self, weighted: tuple[tuple[T, float], ...]) -> T:
        return self._random.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]

    def _count(self, mean: float) -> int:
        whole = int(mean)
        return self._random.randint(whole // 2, whole + whole // 2) + (self._random.random() < mean - whole)

    def _spread(self, median: float) -> float:
        return median * self._random.lognormvariate(0, 0.5)
