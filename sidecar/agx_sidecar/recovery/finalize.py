"""What a dead run still owes: the events that end its stream and the facts it could not tell. Pure, no I/O.

Everything is derived from its session stream and from the facts it did tell, with the ids it would have used itself,
so whoever tells it twice tells the same (contract, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from agx.errors import RUN_LOST
from agx.facts.schema import (
    ModelCall,
    NodeEnded,
    Outcome,
    Reason,
    RunEnded,
    RunFact,
    RunStarted,
    Service,
    StreamTotals,
    ToolEnded,
    ToolOutcome,
    Trace,
    Usage,
    node_name,
    span_id,
    tool_name,
)
from agx.redis.keys import SessionKeys
from agx.runs.event_sample import Mirror

LOST: Literal["lost"] = "lost"
_RETENTION = 300.0  # seconds, where `begin` does not say

Body = dict[str, Any]
Owed = RunStarted | NodeEnded | ToolEnded | RunEnded


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the session stream."""

    id: str
    type: str
    body: Body
    size: int

    @property
    def ns(self) -> int:
        return int(self.id.split("-", 1)[0]) * 1_000_000


@dataclass(frozen=True, slots=True)
class Obituary:
    """What has to be told: bodies of `error` and `end` (none where the run had ended), facts, and the retention."""

    error: Body | None
    end: Body | None
    facts: list[Owed]
    retention: float


class _Header(TypedDict):
    scope: str
    user: str | None
    session: str | None
    run_id: str
    agent: str
    service: Service
    trace: Trace


@dataclass(slots=True)
class _Request:
    """A model request as the stream shows it."""

    idx: int
    start_ns: int
    model: str
    provider: str
    end_ns: int | None = None
    calls: dict[str, tuple[str, int]] = field(default_factory=dict)  # call id -> tool, time
    returns: dict[str, tuple[ToolOutcome, int]] = field(default_factory=dict)
    answers: set[str] = field(default_factory=set)  # ids of output tools' calls, which no tool executes


def write_obituary(session: SessionKeys, run_id: str, entries: Sequence[Entry], queued: Sequence[RunFact]) -> Obituary:
    """Work out what a run whose process died has not told.

    Args:
        entries: its session stream; empty where another run has restarted it.
        queued: the facts of the run and its sub-agents that are still in the queue.
    """
    told = [fact for fact in queued if fact.run_id == run_id]
    begin = entries[0].body if entries and entries[0].type == "begin" else {}
    started = next((fact for fact in told if isinstance(fact, RunStarted)), None)
    ended = next((entry for entry in reversed(entries) if entry.type == "end"), None)
    retention = float(begin.get("retention", _RETENTION))
    error = end = None
    if entries and ended is None:
        seq = max((entry.body.get("seq", -1) for entry in entries), default=-1)
        error = {"msg": RUN_LOST.sentence, "error_type": LOST, "code": RUN_LOST.code, "seq": seq + 1}
        end = {"run_id": run_id, "outcome": LOST, "reason": None, "seq": seq + 2}
    header = _header(session, run_id, begin, started)
    if begin.get("manual") or header is None:
        return Obituary(error, end, [], retention)
    known = {fact.id for fact in told if not isinstance(fact, RunStarted)}
    if f"{run_id}:end" in known:
        return Obituary(error, end, [], retention)
    start_ns = started.start_ns if started is not None else entries[0].ns
    facts: list[Owed] = []
    if started is None:
        facts.append(RunStarted(id=f"{run_id}:start", **header, start_ns=start_ns, follows=begin.get("follows")))
    last_ns = max([start_ns, *(entry.ns for entry in entries), *_ends(told)])
    facts += [fact for fact in _open_parts(header, entries, last_ns) if fact.id not in known]
    steps = [fact for fact in (*told, *facts) if isinstance(fact, NodeEnded | ToolEnded)]
    facts += _sub_agents(run_id, queued, last_ns)
    facts.append(_run_ended(header, entries, ended, steps, start_ns=start_ns, last_ns=last_ns, begin=begin))
    return Obituary(error, end, facts, retention)


def _header(session: SessionKeys, run_id: str, begin: Body, started: RunStarted | None) -> _Header | None:
    if started is not None:
        agent, service, trace = started.agent, started.service, started.trace
    else:
        parts = str(begin.get("traceparent", "")).split("-")
        if len(parts) != 4:
            return None  # it never began, or its first facts and its `begin` are both gone
        agent, service = str(begin.get("agent", "agent")), Service(str(begin.get("service", "unknown_service")))
        trace = Trace(parts[1], parts[2], begin.get("parent_span_id"), parts[3] == "01", bool(begin.get("sdk")))
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


def _ends(told: Iterable[RunFact]) -> Iterable[int]:
    return (fact.end_ns for fact in told if isinstance(fact, NodeEnded | ToolEnded))


def _open_parts(header: _Header, entries: Sequence[Entry], last_ns: int) -> Iterable[NodeEnded | ToolEnded]:
    for request in _requests(entries):
        yield _node(header, request, last_ns)
        if request.end_ns is None:
            continue  # its tools were not begun
        for call_id, (tool, called_ns) in request.calls.items():
            if call_id in request.answers:
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


def _requests(entries: Sequence[Entry]) -> list[_Request]:
    requests: dict[int, _Request] = {}
    for entry in entries:
        body = entry.body
        what, idx = body.get("event"), body.get("idx")
        if entry.type != "event" or not isinstance(idx, int):
            continue
        if what == "llm-begin":
            model, provider = str(body.get("model", "unknown")), str(body.get("provider", "unknown"))
            requests[idx] = _Request(idx, entry.ns, model, provider)
        if (request := requests.get(idx)) is None:
            continue
        call_id = str(body.get("tool_call_id", ""))
        if what == "llm-end":
            request.end_ns = entry.ns
        elif what == "answer" and call_id:
            request.answers.add(call_id)
        elif body.get("part_kind") == "tool-call":
            request.calls[call_id] = (str(body.get("tool_name")), entry.ns)
        elif body.get("part_kind") == "tool-return":
            request.returns[call_id] = (body.get("tool_outcome", "ok"), entry.ns)
    return list(requests.values())


def _node(header: _Header, request: _Request, last_ns: int) -> NodeEnded:
    name = node_name("model_request", request.idx)
    end_ns = request.end_ns or last_ns
    outcome: Outcome = "completed" if request.end_ns is not None else "lost"
    return NodeEnded(
        id=f"{header['run_id']}:{name}",
        **_at(header, name),
        node="model_request",
        idx=request.idx,
        outcome=outcome,
        start_ns=request.start_ns,
        end_ns=end_ns,
        error_type=LOST if outcome == "lost" else None,
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
    """Return the header of a part of the run, in its place of the trace."""
    run = header["trace"]
    place = Trace(run.trace_id, span_id(header["run_id"], name), run.span_id, run.sampled, run.sdk, run.trace_state)
    return {**header, "trace": place}


def _run_ended(
    header: _Header,
    entries: Sequence[Entry],
    ended: Entry | None,
    steps: Sequence[NodeEnded | ToolEnded],
    *,
    start_ns: int,
    last_ns: int,
    begin: Body,
) -> RunEnded:
    outcome: Outcome = LOST
    reason: Reason | None = None
    error_type: str | None = LOST
    if ended is not None:
        outcome, reason = ended.body.get("outcome", LOST), ended.body.get("reason")
        errors = [str(entry.body.get("error_type", "_OTHER")) for entry in entries if entry.type == "error"]
        error_type = (errors[-1] if errors else "_OTHER") if outcome in ("failed", LOST) else None
    mirror = Mirror()
    for entry in entries:
        mirror.add(entry.ns, entry.type, entry.body)
    return RunEnded(
        id=f"{header['run_id']}:end",
        **header,
        outcome=outcome,
        reason=reason,
        start_ns=start_ns,
        end_ns=last_ns,
        error_type=error_type,
        end_ms=None if ended is None else ended.ns // 1_000_000,
        model_calls=sum(1 for step in steps if isinstance(step, NodeEnded) and step.model is not None),
        tool_calls=sum(1 for step in steps if isinstance(step, ToolEnded)),
        stream=StreamTotals(events=len(entries), bytes=sum(entry.size for entry in entries)),
        events=mirror.events,
        events_between=mirror.between,
        follows=begin.get("follows"),
        partial=True,
    )
