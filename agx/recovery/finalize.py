"""Finalizes a lost run: the entries that end its stream, and the facts that its process did not queue. Pure, no I/O.

Everything is derived from the stream and from the facts that are queued, with the ids that the run's process would have
used. So it may be done twice, or by two processes: the same ids count once (contract, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..error_codes import ATTEMPTS_EXHAUSTED, RUN_CANCELED, RUN_LOST
from ..facts.schema import ERROR_OUTCOMES, NodeEnded, Outcome, Reason, RunEnded, RunFact, RunStarted, ToolEnded
from ..redis.keys import SessionKeys
from ..stream.entry import Body
from .missing_facts import LOST, MissingFacts, find_missing_facts
from .recorded_run import RecordedRun

MissingFact = RunStarted | NodeEnded | ToolEnded | RunEnded


@dataclass(frozen=True, slots=True)
class Finalization:
    """What is missing of a run. `error` and `end` are bodies of stream entries, None where the stream has an `end`."""

    error: Body | None
    end: Body | None
    facts: tuple[MissingFact, ...]
    outcome: Outcome


def finalize_run(
    session: SessionKeys, run_id: str, run: RecordedRun, queued: Sequence[RunFact], *, cancel_ms: int | None = None
) -> Finalization:
    """Work out what is missing of a run whose process is gone.

    Args:
        run: what its stream shows.
        queued: the facts of the run and of its sub-agents that are in the queue.
        cancel_ms: server time of a `cancel()` that came after the process died; None where nobody cancelled the run.
    """
    error = end = None
    ending = _Ending.of(run, cancel_ms)
    if not run.is_empty and run.end is None:
        error = {**ending.error_body, "seq": run.next_seq}
        end = {"run_id": run_id, "outcome": ending.outcome, "reason": ending.reason, "seq": run.next_seq + 1}
    return Finalization(error, end, tuple(_missing_facts(session, run_id, run, queued, ending)), ending.outcome)


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a run ends, or ended."""

    outcome: Outcome
    reason: Reason | None
    error_type: str | None
    error_body: Body
    cancel_ms: int | None = None
    end_ms: int | None = None

    @classmethod
    def of(cls, run: RecordedRun, cancel_ms: int | None) -> _Ending:
        if run.end is not None:
            outcome = run.end.outcome
            error_type = (run.last_error_type or "_OTHER") if outcome in ERROR_OUTCOMES else None
            return cls(outcome, run.end.reason, error_type, {}, cancel_ms, run.end.at_ms)
        if cancel_ms is not None:
            return cls(
                "cancelled", "cancel", None, {"msg": RUN_CANCELED.sentence, "code": RUN_CANCELED.code}, cancel_ms
            )
        code = ATTEMPTS_EXHAUSTED if run.is_exhausted else RUN_LOST
        return cls(LOST, None, LOST, {"msg": code.sentence, "error_type": LOST, "code": code.code})


def _missing_facts(
    session: SessionKeys, run_id: str, run: RecordedRun, queued: Sequence[RunFact], ending: _Ending
) -> Iterable[MissingFact]:
    missing = find_missing_facts(session, run_id, run, queued)
    if missing is not None:
        yield from missing.facts
        yield _run_ended(run, missing, ending)


def _run_ended(run: RecordedRun, missing: MissingFacts, ending: _Ending) -> RunEnded:
    return RunEnded(
        id=f"{missing.header['run_id']}:end",
        **missing.header,
        outcome=ending.outcome,
        reason=ending.reason,
        start_ns=missing.start_ns,
        end_ns=missing.last_ns,
        error_type=ending.error_type,
        cancel_ms=ending.cancel_ms,
        end_ms=ending.end_ms,
        model_calls=sum(1 for step in missing.all_steps if isinstance(step, NodeEnded) and step.model is not None),
        tool_calls=sum(1 for step in missing.all_steps if isinstance(step, ToolEnded)),
        first_text_ns=None if run.first_text_at_ns is None else max(0, run.first_text_at_ns - run.called_ns),
        stream=run.totals,
        events=run.sample.events,
        events_between=run.sample.between,
        attempts_exhausted=ending.outcome == LOST and run.is_exhausted,
        follows=None if run.begin is None else run.begin.follows,
        partial=True,
    )
