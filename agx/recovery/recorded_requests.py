"""Reads the model requests and tool calls of a run, or of one of its sub-agents, from entries of its stream. No I/O.

Other clients write to the stream too, so a value of an unexpected type is never an error: it counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from ..facts.schema import ToolOutcome
from ..stream.entry import RUNTIME, Body, StreamEntry

LAST_MS = 9_000_000_000_000  # the year 2255: later ids are invalid, and their nanoseconds do not fit into a fact
_MOST_TEXT = 200  # characters of a name, as labels are cut
_MOST_IDX = 2**53


@dataclass(slots=True)
class RecordedRequest:
    """A model request and the tool calls of its response."""

    idx: int
    start_ns: int
    model: str
    provider: str
    end_ns: int | None = None  # None: it was under way
    asked: bytes | None = None  # the checkpoint of its `llm-begin`
    answer: bytes | None = None  # the checkpoint of its response
    chars: int = 0  # of text that it streamed
    prompt_chars: int | None = None  # of its prompt, as far as the stream has it; only for a sub-agent's request
    seen_ns: int | None = None  # the last entry of its attempt; None: no other attempt followed
    calls: dict[str, tuple[str, int]] = field(default_factory=dict)  # by call id: tool, time
    returns: dict[str, tuple[ToolOutcome, int]] = field(default_factory=dict)
    output_calls: set[str] = field(default_factory=set)  # of output tools, which nothing executes
    is_answer: bool = False  # it gave the final answer

    @property
    def begun_calls(self) -> dict[str, tuple[str, int]]:
        """The tool calls that were, or may have been, executed: none before the response was complete."""
        if self.end_ns is None:
            return {}
        return {call_id: call for call_id, call in self.calls.items() if call_id not in self.output_calls}


def read_requests(entries: Iterable[StreamEntry], sub_agent: str | None = None) -> list[RecordedRequest]:
    """Return the requests of a run, or of one of its sub-agents; each `resume` ends what was under way."""
    requests: dict[int, RecordedRequest] = {}
    last_ns = 0
    for entry in entries:
        body, ns = own_body(entry), entry_ns(entry)
        if entry.type == "resume" and entry.origin == RUNTIME:
            for before in requests.values():
                before.seen_ns = before.seen_ns or last_ns
        last_ns = max(last_ns, ns)
        if entry.type != "event" or (body.get("run") if entry.is_from_sub_agent else None) != sub_agent:
            continue
        what, idx = body.get("event"), count_of(body.get("idx"))
        if idx is None:
            continue
        if what == "llm-begin":
            model, provider = text_of(body.get("model"), "unknown"), text_of(body.get("provider"), "unknown")
            requests[idx] = RecordedRequest(idx, ns, model, provider, asked=entry.checkpoint)
        if (request := requests.get(idx)) is not None:
            _add_to(request, what, body, ns)
            if what == "llm-end":
                request.answer = entry.checkpoint
    return list(requests.values())


def _add_to(request: RecordedRequest, what: Any, body: Body, ns: int) -> None:
    if what == "llm-end":
        request.end_ns = ns
        return
    if what in ("part_start", "part_delta") and body.get("part_kind") != "tool-return":
        text = body.get("content" if what == "part_start" else "content_delta")
        request.chars += len(text) if isinstance(text, str) else 0
    request.is_answer |= what == "answer"
    call_id = body.get("tool_call_id")
    if not isinstance(call_id, str):
        return
    if what == "answer":
        request.output_calls.add(call_id)
    elif body.get("part_kind") == "tool-call":
        request.calls[call_id] = (text_of(body.get("tool_name"), "unknown"), ns)
    elif body.get("part_kind") == "tool-return":
        outcome = body.get("tool_outcome", "ok")
        request.returns[call_id] = (cast("ToolOutcome", outcome) if outcome in get_args(ToolOutcome) else "error", ns)


def text_of(value: object, default: str) -> str:
    """Return a name, cut; the default for any other value."""
    return value[:_MOST_TEXT] if isinstance(value, str) and value else default


def count_of(value: object) -> int | None:
    """Return a count, None for any other value."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_IDX else None


def own_body(entry: StreamEntry) -> Body:
    """Return a body of the runtime's; nothing in a user's body is read."""
    return {} if entry.is_users else entry.body


def entry_ns(entry: StreamEntry) -> int:
    """Return the server's time of an entry, in ns."""
    return min(entry.id[0], LAST_MS) * 1_000_000
