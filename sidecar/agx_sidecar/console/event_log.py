"""Turns a run's events into lines of text: one for each event, and one for all deltas of a part. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from agx.error_codes import RUN_CANCELED
from agx.facts.schema import RunEnded
from agx.stream.entry import PROMPT, StreamEntry

LINES = 300  # on a page, the newest
_TEXT = 4_000  # characters of content a line


@dataclass(slots=True)
class Line:
    """One line. `text` is content (texts of models and users, arguments, results); empty where it is not shown."""

    key: str
    at_ms: int
    what: str
    about: str = ""
    text: str = ""
    pieces: int = 0  # of a part that comes in deltas
    chars: int = 0
    inner: list[Line] = field(default_factory=list)  # of a sub-agent, whose line this is


def write_lines(entries: Sequence[StreamEntry], *, content: bool) -> list[Line]:
    """Return the lines of a stream, oldest first."""
    lines: list[Line] = []
    sub_agents: dict[str, Line] = {}  # by run
    parts: dict[tuple[str, str], Line] = {}  # by run and place, those of the current model requests
    for entry in entries:
        body = entry.body
        if entry.type == "error" and body.get("code") == RUN_CANCELED.code:
            continue  # the `end` has it
        # Anybody may have added an event, with anything in it.
        run = str(body.get("run")) if entry.is_from_sub_agent else ""
        part = run, f"{body.get('idx')}/{body.get('event_idx')}"
        is_delta = body.get("event") == "part_delta"
        line = parts.get(part) if is_delta else None
        if line is None:
            line = _line(entry, body)
            (_open_sub_agent(lines, sub_agents, entry, run).inner if run else lines).append(line)
        if body.get("event") == "llm-begin":
            parts = {place: line for place, line in parts.items() if place[0] != run}
        is_text = body.get("part_kind") in ("text", "thinking")
        if is_text:
            parts[part] = line
            line.pieces += 1
        if content or is_text:
            text = str(body.get("content_delta", "")) if is_delta else _content(entry, body)
            line.chars += len(text) if is_text else 0
            if content and len(line.text) < _TEXT:
                line.text = (line.text + text)[:_TEXT]
    return lines


def _open_sub_agent(lines: list[Line], sub_agents: dict[str, Line], entry: StreamEntry, run: str) -> Line:
    """Return the line of a sub-agent. Its first event adds that line, at the end or inside the line of its caller."""
    if run not in sub_agents:
        caller = sub_agents.get(str(entry.body.get("parent_run")))
        sub_agents[run] = Line(f"s{run[:100]}", entry.id[0], "sub-agent", str(entry.body.get("agent"))[:300])
        (lines if caller is None else caller.inner).append(sub_agents[run])
    return sub_agents[run]


def sampled_lines(ended: RunEnded) -> Iterator[Line]:
    """Yield the lines of a run whose stream has expired: its event sample, which has no content."""
    for n, event in enumerate(ended.events):
        yield Line(f"m{n}", event.at_ns // 1_000_000, event.name, _about(event.attributes))


def _line(entry: StreamEntry, body: dict[str, Any]) -> Line:
    what = str(body.get("event", entry.type)) if entry.type == "event" else entry.type
    if entry.type in ("begin", "event", "end"):
        about = _about(body)
    else:  # a service's own: whatever its names are, their values may be content
        about = f"{body.get('error_type') or ''} from {entry.origin}".strip()[:300]
    ms, n = entry.id
    return Line(f"e{ms}-{n}", ms, "part" if what in ("part_start", "part_delta") else what, about)


def _about(body: dict[str, Any] | dict[str, str | int]) -> str:
    """Return what is not content: kinds, names and outcomes."""
    names = [str(body[name]) for name in ("part_kind", "model", "agent", "tool_name") if body.get(name) is not None]
    names += [str(body[name]) for name in ("tool_outcome", "outcome", "reason", "error_type") if body.get(name)]
    return " · ".join(names)[:300]


def _content(entry: StreamEntry, body: dict[str, Any]) -> str:
    if entry.type in ("begin", "end"):
        return ""
    if entry.origin == PROMPT:
        return str(body.get("prompt") or "goes on with the decided calls")
    if entry.type != "event":
        return str(body["msg"]) if set(body) <= {"msg", "error_type", "code", "seq"} and "msg" in body else _json(body)
    value = body.get("content", body.get("args", ""))
    return value if isinstance(value, str) else _json(value)


def _json(value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return "nested too deeply to be shown"
