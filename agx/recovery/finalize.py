"""Finalizes a lost run: the entries that end its stream, and the facts that its process did not queue. Pure, no I/O.

Everything is derived from the stream and from the facts that are queued, with the ids that the run's process would have
used. So it may be done twice, or by two processes: the same ids count once (contract, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from ..errors import ATTEMPTS_EXHAUSTED, RUN_CANCELED, RUN_LOST
from ..facts.schema import (
    ModelCall,
    NodeEnded,
    Outcome,
    Reason,
    RunEnded,
    RunFact,
    RunStarted,
    Service,
    ToolEnded,
    Trace,
    Usage,
    node_name,
    span_id,
    tool_name,
)
from ..redis.keys import SessionKeys
from .recorded_run import Body, RecordedRequest, RecordedRun

LOST: Literal["lost"] = "lost"

MissingFact = RunStarted | NodeEnded | ToolEnded | RunEnded


@dataclass(frozen=True, slots=True)
class Finalization:
    """What is missing of a run. `error` and `end` are bodies of stream entries, None where the stream has an `end`."""

    error: Body | None
    end: Body | None
    facts: tuple[MissingFact, ...]
    outcome: Outcome


class _Header(TypedDict):
    scope: str
    user: str | None
    session: str | None
    run_id: str
    agent: str
    service: Service
    trace: Trace


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
            error_type = (run.last_error_type or "_OTHER") if outcome in ("failed", LOST) else None
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
    own = [fact for fact in queued if fact.run_id == run_id]
    started = next((fact for fact in own if isinstance(fact, RunStarted)), None)
    header = _header(session, run_id, run, started)
    known = {fact.id for fact in own}
    if header is None or f"{run_id}:end" in known:
        return
    start_ns = run.first_ns if started is None else started.start_ns
    follows = None if run.begin is None else run.begin.follows
    if started is None:
        yield RunStarted(id=f"{run_id}:start", **header, start_ns=start_ns, follows=follows)
    steps = [fact for fact in own if isinstance(fact, NodeEnded | ToolEnded)]
    last_ns = max([start_ns, run.last_ns, *(fact.end_ns for fact in steps)])
    for fact in _open_steps(header, run, last_ns):
        if fact.id not in known:
            steps.append(fact)
            yield fact
    yield from _sub_agents(run_id, queued, last_ns)
    yield _run_ended(header, run, steps, ending, start_ns=start_ns, last_ns=last_ns, follows=follows)


def _header(session: SessionKeys, run_id: str, run: RecordedRun, started: RunStarted | None) -> _Header | None:
    """Return what all facts of the run carry; None for one that never began, and for a session opened by hand."""
    if started is not None:
        agent, service, trace = started.agent, started.service, started.trace
    elif run.begin is not None and run.begin.trace is not None and not run.begin.is_manual:
        agent, service, trace = run.begin.agent, Service(run.begin.service), run.begin.trace
    else:
        return None
    return {
        "scope": session.scope,
        "user": session.user,
        "session": session.session,
        "run_id": run_id,
        "agent": agent,
        "service": service,
        "trace": trace,
    }


def _sub_agents(run_id: str, queued: Sequence[RunFact], last_ns: int) -> Iterable[RunEnded]:
    """A sub-agent has no lease of its own: it was lost with the run in whose tool it worked."""
    ended = {fact.run_id for fact in queued if isinstance(fact, RunEnded)}
    for fact in queued:
        if isinstance(fact, RunStarted) and fact.parent_run_id == run_id and fact.run_id not in ended:
            yield RunEnded(
                id=f"{fact.run_id}:end",
                scope=fact.scope,
                user=fact.user,
                session=fact.session,
                run_id=fact.run_id,
                parent_run_id=run_id,
                agent=fact.agent,
                service=fact.service,
                trace=fact.trace,
                outcome=LOST,
                start_ns=fact.start_ns,
                end_ns=max(last_ns, fact.start_ns),
                error_type=LOST,
                partial=True,
            )


def _open_steps(header: _Header, run: RecordedRun, last_ns: int) -> Iterable[NodeEnded | ToolEnded]:
    """Yield the run's model requests and tool calls; what was under way ends with the run, as `lost` or `error`."""
    for request in run.requests:
        yield _request_ended(header, request, last_ns)
        if request.end_ns is None:
            continue  # its tools were not begun
        for call_id, (tool, called_ns) in request.calls.items():
            if call_id in request.output_calls:
                continue
            outcome, end_ns = request.returns.get(call_id, ("error", last_ns))
            name = tool_name(request.idx, call_id)
            yield ToolEnded(
                id=f"{header['run_id']}:{name}",
                **_at(header, name),
                tool=tool,
                call_id=call_id,
                idx=request.idx,
                outcome=outcome,
                start_ns=min(called_ns, end_ns),
                end_ns=end_ns,
                error_type=LOST if call_id not in request.returns else None,
            )


def _request_ended(header: _Header, request: RecordedRequest, last_ns: int) -> NodeEnded:
    name = node_name("model_request", request.idx)
    end_ns = request.end_ns or last_ns
    outcome: Outcome = "completed" if request.end_ns is not None else LOST
    return NodeEnded(
        id=f"{header['run_id']}:{name}",
        **_at(header, name),
        node="model_request",
        idx=request.idx,
        outcome=outcome,
        start_ns=request.start_ns,
        end_ns=end_ns,
        error_type=LOST if outcome == LOST else None,
        model=ModelCall(
            provider=request.provider,
            request_model=request.model,
            response_model=None,
            response_id=None,
            stream=True,
            finish_reason=None,
            finish_reason_missing=False,
            first_chunk_ns=None,
            chunk_counts=(),
            chunk_sum_ns=0,
            usage=Usage(source="missing"),
            start_ns=request.start_ns,
            end_ns=end_ns,
        ),
    )


def _at(header: _Header, name: str) -> _Header:
    """Return the header of a part of the run, with its place in the trace."""
    run = header["trace"]
    place = Trace(run.trace_id, span_id(header["run_id"], name), run.span_id, run.sampled, run.sdk, run.trace_state)
    return {**header, "trace": place}


def _run_ended(
    header: _Header,
    run: RecordedRun,
    steps: Sequence[NodeEnded | ToolEnded],
    ending: _Ending,
    *,
    start_ns: int,
    last_ns: int,
    follows: str | None,
) -> RunEnded:
    return RunEnded(
        id=f"{header['run_id']}:end",
        **header,
        outcome=ending.outcome,
        reason=ending.reason,
        start_ns=start_ns,
        end_ns=last_ns,
        error_type=ending.error_type,
        cancel_ms=ending.cancel_ms,
        end_ms=ending.end_ms,
        model_calls=sum(1 for step in steps if isinstance(step, NodeEnded) and step.model is not None),
        tool_calls=sum(1 for step in steps if isinstance(step, ToolEnded)),
        stream=run.totals,
        events=run.sample.events,
        events_between=run.sample.between,
        attempts_exhausted=ending.outcome == LOST and run.is_exhausted,
        follows=follows,
        partial=True,
    )
