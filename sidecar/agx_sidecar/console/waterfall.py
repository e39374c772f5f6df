"""Lays a run's history out on a time axis: a bar per run, node and tool, and the tokens used. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from agx.facts.schema import (
    NodeEnded,
    RunEnded,
    RunResumed,
    RunStarted,
    ToolEnded,
    Usage,
)

from .run_history import RunHistory

Kind = Literal["run", "model", "step", "tool"]

MOST_BARS = 200
_DEEPEST = 12  # a fact that names its own run as its parent ends here


@dataclass(frozen=True, slots=True)
class Bar:
    """One row. Times: nanoseconds of the service's clock; `end_ns` None is still open."""

    kind: Kind
    name: str
    depth: int
    start_ns: int
    end_ns: int | None
    outcome: str | None = None  # None while it is open
    error_type: str | None = None
    first_chunk_ns: int | None = None  # when it came
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class TokenStep:
    """The tokens used up to a moment."""

    at_ns: int
    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Waterfall:
    """A run's bars, in their order, and its tokens, within its time."""

    start_ns: int
    end_ns: int  # of what is still open: now
    bars: tuple[Bar, ...]  # the run's own, and the last of the others
    tokens: tuple[TokenStep, ...]
    left_out: int  # bars before those
    from_ns: int  # where the time of the bars that are shown begins


def draw_waterfall(history: RunHistory) -> Waterfall:
    """Lay a run out; open parts come from the stream, whose times are the server's, moved to the service's clock."""
    skew_ns = _skew(history)
    run_id, opened = history.place.run_id, list(_open_bars(history, skew_ns))
    bars = [*_begin_bar(history, skew_ns), *_run_bars(history, run_id, 0, opened, {run_id})]
    starts = [bar.start_ns for bar in bars]
    ends = [bar.end_ns for bar in bars if bar.end_ns is not None]
    now_ns = history.now_ms * 1_000_000 - skew_ns
    start = min(starts, default=now_ns)
    end = max([*ends, start + 1] if history.ended is not None or not history.is_live else [*ends, now_ns, start + 1])
    left_out = max(0, len(bars) - MOST_BARS)
    shown = (*bars[:1], *bars[1 + left_out :])
    first = min(bar.start_ns for bar in shown[1:]) if left_out else start
    return Waterfall(start, end, shown, tuple(_tokens(history)), left_out, min(first, end - 1))


def _skew(history: RunHistory) -> int:
    """Return by how much the server's clock is ahead of the service's: both recorded the time of the begin."""
    if history.started is None or history.begin is None:
        return 0
    return history.begin.id[0] * 1_000_000 - history.started.start_ns


def _begin_bar(history: RunHistory, skew_ns: int) -> Iterator[Bar]:
    """Yield the run's own bar where no fact of it has come yet."""
    if history.is_live and history.started is None and history.begin is not None:
        agent = str(history.begin.body.get("agent", "a session opened by hand"))
        yield Bar("run", agent, 0, history.begin.id[0] * 1_000_000 - skew_ns, None)


def _run_bars(history: RunHistory, run_id: str, depth: int, opened: list[Bar], drawn: set[str]) -> Iterator[Bar]:
    """Yield a run's bar, then what is in it by start, at last what is `opened`; a sub-agent's run under its tool."""
    started = next((fact for fact in history.of(RunStarted) if fact.run_id == run_id), None)
    ended = next((fact for fact in history.of(RunEnded) if fact.run_id == run_id), None)
    fact = ended or started
    if fact is not None:
        outcome = ended.outcome if ended else None
        error = ended.error_type if ended else None
        yield Bar("run", fact.agent, depth, fact.start_ns, ended.end_ns if ended else None, outcome, error)
    parts = [[_node_bar(node, depth + 1)] for node in history.of(NodeEnded) if node.run_id == run_id]
    parts += [[_gap_bar(resumed, depth + 1)] for resumed in history.of(RunResumed) if resumed.run_id == run_id]
    now = [[bar] for bar in opened]  # the last ones, however coarse their times are
    by_span: dict[str, list[Bar]] = {}
    for tool in history.of(ToolEnded):
        if tool.run_id == run_id:
            bar = Bar("tool", tool.tool, depth + 2, tool.start_ns, tool.end_ns, tool.outcome, tool.error_type)
            parts.append([bar])
            by_span[tool.trace.span_id] = parts[-1]
    for sub in history.facts:
        if sub.parent_run_id == run_id and sub.run_id not in drawn and depth < _DEEPEST:
            drawn.add(sub.run_id)
            if bars := list(_run_bars(history, sub.run_id, depth + 3, [], drawn)):
                home = by_span.get(sub.trace.parent_span_id or "") or _around(bars[0], [*parts, *now])
                parts.append(bars) if home is None else home.extend(bars)
    # Of two that begin together the longer encloses the other.
    for bars in (*sorted(parts, key=lambda bars: (bars[0].start_ns, -(bars[0].end_ns or 0))), *now):
        yield from bars


def _around(bar: Bar, parts: list[list[Bar]]) -> list[Bar] | None:
    """Return the last tool that encloses a bar: the spans of a service's own SDK are not in the facts."""
    last = max(bar.start_ns, bar.end_ns or 0)
    around = [part for part in parts if part[0].kind == "tool" and part[0].start_ns <= bar.start_ns
              and (part[0].end_ns is None or part[0].end_ns >= last)]  # fmt: skip
    return max(around, key=lambda part: part[0].start_ns, default=None)


def _gap_bar(resumed: RunResumed, depth: int) -> Bar:
    """Return the time in which no process had the run."""
    return Bar("step", f"attempt {resumed.attempt}", depth, resumed.last_ns, resumed.at_ns, "resumed")


def _node_bar(node: NodeEnded, depth: int) -> Bar:
    name = node.node.replace("_", " ")
    first = usage = None
    if node.model is not None:
        name = f"{name} {node.idx + 1} · {node.model.response_model or node.model.request_model}"
        usage = node.model.usage
        if node.model.first_chunk_ns is not None:
            first = node.model.start_ns + node.model.first_chunk_ns
    kind: Kind = "step" if node.model is None else "model"
    return Bar(kind, name, depth, node.start_ns, node.end_ns, node.outcome, node.error_type, first, usage)


def _open_bars(history: RunHistory, skew_ns: int) -> Iterator[Bar]:
    """Yield the parts whose begin is in the stream and whose end is in neither stream nor facts."""
    if not history.is_live or history.is_recovering:
        return
    run_id = history.place.run_id
    requests: dict[int, Bar] = {}
    calls: dict[str, Bar] = {}
    for entry in history.entries:
        body = entry.body
        if entry.type == "resume":
            requests.clear()  # what the dead process had under way is asked again
        idx, call_id = body.get("idx"), str(body.get("tool_call_id"))
        if entry.type != "event" or entry.is_from_sub_agent or not isinstance(idx, int):
            continue
        at_ns = entry.id[0] * 1_000_000 - skew_ns
        if body.get("event") == "llm-begin":
            requests[idx] = Bar("model", f"model request {idx + 1} · {body.get('model', 'unknown')}", 1, at_ns, None)
        elif body.get("event") == "llm-end":
            requests.pop(idx, None)
        elif body.get("event") == "answer" or body.get("part_kind") == "tool-return":
            calls.pop(call_id, None)
        else:
            if idx in requests and requests[idx].first_chunk_ns is None:
                requests[idx] = replace(requests[idx], first_chunk_ns=at_ns)
            if body.get("part_kind") == "tool-call":
                calls[call_id] = Bar("tool", str(body.get("tool_name")), 2, at_ns, None)
    known = {node.idx for node in history.of(NodeEnded) if node.run_id == run_id and node.model is not None}
    ended = {tool.call_id for tool in history.of(ToolEnded) if tool.run_id == run_id}
    yield from (bar for idx, bar in requests.items() if idx not in known)
    yield from (bar for call_id, bar in calls.items() if call_id not in ended)


def _tokens(history: RunHistory) -> Iterator[TokenStep]:
    given = taken = 0
    for node in sorted(history.of(NodeEnded), key=lambda node: node.end_ns):
        if node.model is not None:
            given, taken = given + node.model.usage.input, taken + node.model.usage.output
            yield TokenStep(node.model.end_ns, given, taken)
