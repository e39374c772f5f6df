"""Makes up runs of every outcome, agent, model, tool result and error, and queues them, one fact in twenty twice."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, get_args

from support.made_facts import T0, call, ended, heartbeat, node, resumed, run_of, started, tool, usage
from support.replica import Queue

from agx.facts.schema import (
    APPEND_BUCKETS,
    CHUNK_BUCKETS,
    ApprovalDecided,
    DecisionKind,
    Fact,
    Outcome,
    RunFeedback,
    RunSteered,
    Service,
    SteerOutcome,
    StreamTotals,
)
from agx_sidecar.metrics.table import (
    OUTCOMES,
    REASONS,
    STAGES,
    TOOL_OUTCOMES,
    USAGE_SOURCES,
)

from .ledger import Ledger

SCOPES = ("acme", "globex", "initech")
# Agent, provider, model: one price for all, prices by tiers, none at all.
AGENTS = (
    ("support", "openai", "gpt-4o-mini"),
    ("research", "anthropic", "claude-sonnet-4-5"),
    ("triage", "in-house", "in-house-7b"),
)
SERVICES = ("shop", "desk")
TOOLS = ("search", "refund", "read_page")
ERRORS = ("ModelHTTPError", "UnexpectedModelBehavior", "TimeoutError", None)
STEER_OUTCOMES: tuple[SteerOutcome, ...] = get_args(SteerOutcome)
DECISIONS: tuple[DecisionKind, ...] = get_args(DecisionKind)
_REPEATED = 0.05
_KEPT = 2_000  # facts that may come a second time


class Generator:
    """Queues made-up runs and notes each in the ledger, first."""

    def __init__(self, queue: Queue, ledger: Ledger, seed: int) -> None:
        self._queue, self._ledger, self._chance = queue, ledger, random.Random(seed)
        self._sent: list[Fact] = []
        self.repeats = 0

    def feed(self, numbers: Iterable[int], pause: float) -> None:
        """Queue the runs of these numbers, and `pause` seconds after each."""
        for n in numbers:
            facts = [*self._run(n), *([self._heartbeat(n)] if n % 20 == 1 else [])]
            for fact in facts:
                self._ledger.note(fact)
            self._sent = (self._sent + facts)[-_KEPT:]
            again = [self._chance.choice(self._sent) for _ in facts if self._chance.random() < _REPEATED]
            self._queue.add(*facts, *again)
            self.repeats += len(again)
            time.sleep(pause)

    def _run(self, n: int) -> list[Fact]:
        chance, run_id = self._chance, f"made-{n}"
        outcome, error = OUTCOMES[n % 4], ERRORS[n // 4 % 4]
        agent, provider, model = AGENTS[n // 2 % 3]
        of_run = {"scope": chance.choice(SCOPES), "agent": agent, "service": Service(chance.choice(SERVICES))}
        requests = 1 + n % 3
        times = [T0 + chance.randrange(10**9)]
        for _ in range(2 * requests):
            times.append(times[-1] + chance.randrange(1, 5 * 10**9))
        waited_ns = chance.randrange(10**11) if n % 3 else None
        made: list[Fact] = [started(run_id, start_ns=times[0], waited_ns=waited_ns, **of_run)]
        for attempt in range(2, 2 + n % 4):
            last_ns = times[0] + chance.randrange(10**9)
            at_ns = last_ns + chance.randrange(2 * 10**10)
            made.append(resumed(run_id, attempt, last_ns=last_ns, at_ns=at_ns, **of_run))
        for step, (begin, end) in enumerate(pairwise(times[:-1])):
            idx, is_last = step // 2, step == 2 * requests - 2
            ends: Outcome = outcome if is_last else "completed"  # type: ignore[assignment] # a str of OUTCOMES
            shared = {**of_run, "start_ns": begin, "end_ns": end, "outcome": ends}
            if step % 2:
                made.append(node(run_id, idx, id=f"{run_id}:tools:{idx}", node="call_tools", model=None, **shared))
                made.append(self._tool(run_id, idx, {**of_run, "start_ns": begin, "end_ns": end}))
            else:
                failure = error if ends in ("failed", "lost") else None
                asked = self._call(provider, model, begin, end)
                made.append(node(run_id, idx, model=asked, error_type=failure, **shared))
        made.append(self._end(run_id, n, outcome, error, times, of_run))
        made += self._asked_of(run_id, n, times[-1], of_run)
        return made

    def _asked_of(self, run_id: str, n: int, at_ns: int, of_run: dict[str, Any]) -> Iterable[Fact]:
        """Yield what others asked of a run: a message, a decision on a tool call, a score."""
        chance, shared = self._chance, {**run_of(run_id), **of_run}
        if n % 3 == 0:
            outcome = STEER_OUTCOMES[n // 3 % 2]
            yield RunSteered(id=f"{run_id}:steer", outcome=outcome, at_ns=at_ns, **shared)
        if n % 4 == 0:
            began_ns, decision = at_ns - chance.randrange(10**12), DECISIONS[n // 4 % 3]
            yield ApprovalDecided(id=f"{run_id}:decided", decision=decision, start_ns=began_ns, end_ns=at_ns, **shared)
        if n % 5 == 0:
            value = chance.randrange(5) / 4
            yield RunFeedback(
                id=f"{run_id}:score", name="helpful", value=value, model="gpt-4o-mini", at_ns=at_ns, **shared
            )

    def _end(
        self, run_id: str, n: int, outcome: str, error: str | None, times: list[int], of_run: dict[str, Any]
    ) -> Fact:
        begin, end, is_cancelled = times[0], times[-1], outcome == "cancelled"
        return ended(
            run_id,
            start_ns=begin,
            end_ns=end,
            outcome=outcome,
            error_type=error if outcome in ("failed", "lost") else None,
            reason=REASONS[n // 4 % 5] if is_cancelled else None,
            stage=(*STAGES, None)[n // 4 % 4] if is_cancelled else None,
            cancel_ms=end // 10**6 - self._chance.randrange(2_000) if is_cancelled and n % 8 else None,
            end_ms=end // 10**6 if is_cancelled else None,
            model_calls=1 + n % 3,
            tool_calls=n % 3,
            plain_runs=self._chance.randrange(3),
            first_text_ns=self._chance.choice((None, self._chance.randrange(10**10))),
            attempts_exhausted=outcome == "lost" and n % 3 == 0,
            stream=StreamTotals(*(self._chance.randrange(most) for most in (300, 90_000, 3, 2))),
            **of_run,
        )

    def _tool(self, run_id: str, idx: int, shared: dict[str, object]) -> Fact:
        outcome = self._chance.choice(TOOL_OUTCOMES)
        failure = self._chance.choice(ERRORS) if outcome in ("error", "retry") else None
        name = self._chance.choice(TOOLS)
        return tool(run_id, f"call-{idx}", tool=name, idx=idx, outcome=outcome, error_type=failure, **shared)

    def _call(self, provider: str, model: str, begin: int, end: int) -> object:
        chance = self._chance
        cached, written, thought = (chance.randrange(most) for most in (3_000, 500, 700))
        chunks = tuple(chance.randrange(4) for _ in range(len(CHUNK_BUCKETS) + 1))
        return call(
            provider=provider,
            request_model=model,
            response_model=chance.choice((model, f"{model}-unheard-of", None)),
            first_chunk_ns=chance.choice((None, chance.randrange(10**9))),
            chunk_counts=chance.choice(((), chunks)),
            chunk_sum_ns=chance.randrange(10**9),
            usage=usage(
                input=cached + written + chance.randrange(9_000),
                output=thought + chance.randrange(2_000),
                cache_read=cached,
                cache_write=written,
                reasoning=thought,
                source=chance.choice(USAGE_SOURCES),
            ),
            start_ns=begin + chance.randrange(10**6),
            end_ns=end + 10**6,
        )

    def _heartbeat(self, n: int) -> Fact:
        chance = self._chance
        return heartbeat(
            n,
            gaps=chance.randrange(3),
            rereads=chance.randrange(3),
            append_counts=tuple(chance.randrange(9) for _ in range(len(APPEND_BUCKETS) + 1)),
            append_sum_ns=chance.randrange(10**10),
        )
