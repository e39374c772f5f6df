"""The facts of a run that its dead processes did not queue: by its stream and by the facts that are queued.

The service uses it when it takes a run over, the sidecar when it finalizes one. All ids are those that the dead process
would have used. So it may be done twice, or by two processes: the same ids count once (contract, section 5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import orjson

from ..facts.reader import Call, QueuePages
from ..facts.schema import (
    ModelCall,
    NodeEnded,
    Outcome,
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
from ..facts.usage import convert_usage, estimate_usage, to_count, to_text
from ..redis.keys import SessionKeys
from .recorded_requests import RecordedRequest
from .recorded_run import RecordedRun
from .sub_agents import RecordedSubAgent

LOST: Literal["lost"] = "lost"

_LOOK = 20_000  # facts that are searched at most
_BEFORE_BEGIN_MS = 5_000  # two nodes of a cluster may disagree so far on the time


class Header(TypedDict):
    """What all facts of a run carry."""

    scope: str
    user: str | None
    session: str | None
    run_id: str
    parent_run_id: str | None
    agent: str
    service: Service
    trace: Trace


@dataclass(frozen=True, slots=True)
class MissingFacts:
    """What is missing of a run, but for its end.

    Args:
        started: the fact of its begin; None where it is queued.
        steps: model requests and tool calls.
        sub_agents: those of its sub-agents, with their ends: they died with the process.
        all_steps: `steps`, and those that are queued.
        start_ns: when the run began.
        last_ns: when its last process was last seen.
    """

    header: Header
    started: RunStarted | None
    steps: tuple[NodeEnded | ToolEnded, ...]
    sub_agents: tuple[RunStarted | NodeEnded | ToolEnded | RunEnded, ...]
    all_steps: tuple[NodeEnded | ToolEnded, ...]
    start_ns: int
    last_ns: int

    @property
    def facts(self) -> tuple[RunStarted | NodeEnded | ToolEnded | RunEnded, ...]:
        return (*([] if self.started is None else [self.started]), *self.steps, *self.sub_agents)


async def read_queued_facts(call: Call, queue: str, run_id: str, run: RecordedRun) -> list[RunFact]:
    """Return the facts of a run and of its sub-agents that are in its scope's queue; they follow its `begin`.

    Args:
        call: sends one command and returns its reply.

    Raises:
        RedisError, OSError: whatever `call` raises.
    """
    start = None if run.is_empty else str(max(0, run.first_ns // 1_000_000 - _BEFORE_BEGIN_MS))
    queued: list[RunFact] = []
    # A sub-agent's facts name the run that called it, which may be another sub-agent.
    needles = re.compile("|".join(map(re.escape, (run_id, *(one.run_id for one in run.sub_agents)))).encode())
    searched = 0
    async for page in QueuePages(call, queue, start=start):
        facts = (entry.fact for entry in page if needles.search(entry.payload))
        queued += (fact for fact in facts if isinstance(fact, RunFact))
        searched += len(page)
        if searched >= _LOOK:
            break
    return queued


def find_missing_facts(
    session: SessionKeys,
    run_id: str,
    run: RecordedRun,
    queued: Sequence[RunFact],
    *,
    sent_chars: int | None = None,
) -> MissingFacts | None:
    """Work out which facts of a run are missing; None for one that never began or whose end is queued.

    Args:
        run: what its stream shows.
        queued: the facts of the run and of its sub-agents that are in the queue.
        sent_chars: characters that the run's interrupted request sent, with its instructions; None: as its checkpoint
            has them.
    """
    queued = [fact for fact in queued if fact.scope == session.scope]
    own = [fact for fact in queued if (fact.run_id, fact.user, fact.session) == (run_id, session.user, session.session)]
    started = next((fact for fact in own if isinstance(fact, RunStarted)), None)
    header = _header(session, run_id, run, started)
    known = {fact.id for fact in own}
    if header is None or f"{run_id}:end" in known:
        return None
    start_ns = run.first_ns if started is None else started.start_ns
    ended = [fact for fact in own if isinstance(fact, NodeEnded | ToolEnded)]
    last_ns = max([start_ns, run.last_ns, *(fact.end_ns for fact in ended)])
    steps = [fact for fact in _steps(header, run.requests, last_ns, sent_chars) if fact.id not in known]
    follows = None if run.begin is None else run.begin.follows
    return MissingFacts(
        header=header,
        started=RunStarted(id=f"{run_id}:start", **header, start_ns=start_ns, follows=follows)
        if started is None
        else None,
        steps=tuple(steps),
        sub_agents=tuple(_sub_agents(header, run, queued, last_ns)),
        all_steps=(*ended, *steps),
        start_ns=start_ns,
        last_ns=last_ns,
    )


def _header(session: SessionKeys, run_id: str, run: RecordedRun, started: RunStarted | None) -> Header | None:
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
        "parent_run_id": None if started is None else started.parent_run_id,
        "agent": agent,
        "service": service,
        "trace": trace,
    }


def _sub_agents(
    parent: Header, run: RecordedRun, queued: Sequence[RunFact], last_ns: int
) -> Iterable[RunStarted | NodeEnded | ToolEnded | RunEnded]:
    """Yield what is missing of sub-agents. They have no leases of their own: they were lost with the process."""
    ended = {fact.run_id for fact in queued if isinstance(fact, RunEnded)}
    recorded = {one.run_id: one for one in run.sub_agents}
    parents = {parent["run_id"], *recorded}
    started = {fact.run_id: fact for fact in queued if isinstance(fact, RunStarted) and fact.parent_run_id in parents}
    for one in recorded.values():
        if one.run_id not in started and one.run_id not in ended:
            started[one.run_id] = fact = _sub_agent_started(parent, one)
            yield fact
    for fact in started.values():
        if fact.run_id not in ended:
            yield from _sub_agent_lost(fact, recorded.get(fact.run_id), queued, last_ns)


def _sub_agent_started(parent: Header, one: RecordedSubAgent) -> RunStarted:
    run = parent["trace"]
    place = Trace(run.trace_id, span_id(one.run_id, "run"), run.span_id, run.sampled, run.sdk, run.trace_state)
    who = {"run_id": one.run_id, "parent_run_id": one.parent_run_id, "agent": one.agent, "trace": place}
    header = cast("Header", {**parent, "user": None, "session": None, **who})
    return RunStarted(id=f"{one.run_id}:start", **header, start_ns=one.start_ns)


def _sub_agent_lost(
    started: RunStarted, one: RecordedSubAgent | None, queued: Sequence[RunFact], last_ns: int
) -> Iterable[NodeEnded | ToolEnded | RunEnded]:
    header = cast("Header", {name: getattr(started, name) for name in Header.__annotations__})
    known = [fact for fact in queued if fact.run_id == started.run_id and isinstance(fact, NodeEnded | ToolEnded)]
    ids = {fact.id for fact in known}
    missing = [] if one is None else [s for s in _steps(header, one.requests, last_ns) if s.id not in ids]
    yield from missing
    steps = (*known, *missing)
    yield RunEnded(
        id=f"{started.run_id}:end",
        **header,
        outcome=LOST if one is None else one.outcome,
        start_ns=started.start_ns,
        end_ns=max(last_ns, started.start_ns),
        error_type=LOST if one is None else one.error_type,
        model_calls=sum(1 for step in steps if isinstance(step, NodeEnded) and step.model is not None),
        tool_calls=sum(1 for step in steps if isinstance(step, ToolEnded)),
        partial=True,
    )


def _steps(
    header: Header, requests: Iterable[RecordedRequest], last_ns: int, sent_chars: int | None = None
) -> Iterable[NodeEnded | ToolEnded]:
    """Yield the run's model requests and tool calls; what was under way ends with its attempt, as `lost` or `error`."""
    for request in requests:
        # The next attempt's `resume` does not show that the dead process was still alive.
        seen_ns = last_ns if request.seen_ns is None else request.seen_ns
        yield _request_ended(header, request, seen_ns, sent_chars)
        for call_id, (tool, called_ns) in request.begun_calls.items():
            outcome, end_ns = request.returns.get(call_id, ("error", seen_ns))
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


def _request_ended(header: Header, request: RecordedRequest, seen_ns: int, sent_chars: int | None) -> NodeEnded:
    name = node_name("model_request", request.idx)
    end_ns = request.end_ns or seen_ns
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
        model=_describe(request, end_ns, sent_chars),
    )


def _describe(request: RecordedRequest, end_ns: int, sent_chars: int | None) -> ModelCall:
    """Return what is known of a model request; the provider bills an interrupted one too."""
    response, usage = _read_response(request.answer)
    if request.end_ns is not None or request.seen_ns is not None or sent_chars is None:
        sent_chars = _read_chars(request.asked) if request.prompt_chars is None else request.prompt_chars
    if any(map(usage.get, ("input_tokens", "output_tokens"))):
        known = convert_usage(usage.get)
    else:
        known = Usage(source="missing") if sent_chars is None else estimate_usage(sent_chars, request.chars)
    return ModelCall(
        provider=request.provider,
        request_model=request.model,
        response_model=to_text(response.get("model_name")),
        response_id=to_text(response.get("provider_response_id")),
        stream=True,
        finish_reason=to_text(response.get("finish_reason")),
        usage=known,
        start_ns=request.start_ns,
        end_ns=end_ns,
    )


def _read_response(checkpoint: bytes | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the response that a checkpoint of `llm-end` has as its last message, and its usage; empty without one."""
    try:
        response = orjson.loads(checkpoint or b"")["messages"][-1]
        usage = response["usage"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return {}, {}
    is_response = isinstance(response, dict) and isinstance(usage, dict) and response.get("kind") == "response"
    return (response, usage) if is_response else ({}, {})


def _read_chars(checkpoint: bytes | None) -> int | None:
    """Return the characters of what a request sent, but for instructions that it was the first to send."""
    try:
        chars = orjson.loads(checkpoint or b"")["chars"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return to_count(chars) if isinstance(chars, int) else None


def _at(header: Header, name: str) -> Header:
    """Return the header of a part of the run, with its place in the trace."""
    run = header["trace"]
    place = Trace(run.trace_id, span_id(header["run_id"], name), run.span_id, run.sampled, run.sdk, run.trace_state)
    return {**header, "trace": place}
