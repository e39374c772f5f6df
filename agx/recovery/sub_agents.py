"""Reads the sub-agents of a run from its stream: their requests, and which of them were under way. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

import orjson

from ..facts.schema import ERROR_OUTCOMES, Outcome
from ..stream.entry import RUNTIME, Body, StreamEntry
from .recorded_requests import RecordedRequest, count_of, entry_ns, own_body, read_requests, text_of


@dataclass(slots=True)
class RecordedSubAgent:
    """A run in a tool of a run, or in a tool of another sub-agent.

    Args:
        root: the tool call of the session's run that it belongs to, on whatever level it is.
        is_under_way: whether that call had no result when the last process stopped.
        outcome: how it ended; `lost` where the stream does not show that.
        chars: of its prompt, as far as the stream has it, of its answers, and of its tool calls and their results.
        prompt_chars: by request, the value of `chars` at its `llm-begin`.
    """

    run_id: str
    parent_run_id: str
    agent: str
    root: str
    start_ns: int
    is_under_way: bool = True
    outcome: Outcome = "lost"
    error_type: str | None = "lost"
    requests: tuple[RecordedRequest, ...] = ()
    chars: int = 0
    prompt_chars: dict[int, int] = field(default_factory=dict)


def read_sub_agents(run_id: str, entries: Sequence[StreamEntry]) -> Iterable[RecordedSubAgent]:
    """Yield the sub-agents of a run whose last process is gone, in the order in which they began."""
    reading = _Reading(run_id)
    for entry in entries:
        reading.add(entry)
    for one in reading.found.values():
        one.requests = tuple(read_requests(entries, one.run_id))
        for request in one.requests:
            request.prompt_chars = one.prompt_chars.get(request.idx, 0)
        yield one


@dataclass(slots=True)
class _Reading:
    run_id: str
    found: dict[str, RecordedSubAgent] = field(default_factory=dict)  # by run
    argument_chars: dict[tuple[str, str], int] = field(default_factory=dict)  # by run and tool call

    def add(self, entry: StreamEntry) -> None:
        """Take the next entry of the stream."""
        if entry.type == "resume" and entry.origin == RUNTIME:
            self._mark_ended(self.found.values())
        if entry.type != "event":
            return
        body = own_body(entry)
        call_id = text_of(body.get("tool_call_id"), "")
        run = text_of(body.get("run"), "") if entry.is_from_sub_agent else self.run_id
        if entry.is_from_sub_agent and run:
            self._add_to(run, body, entry_ns(entry))
        if body.get("part_kind") == "tool-call":
            self.argument_chars[run, call_id] = _count_chars(body)
        elif body.get("part_kind") == "tool-return" and run == self.run_id:
            self._mark_ended(one for one in self.found.values() if one.root == call_id)

    def _mark_ended(self, sub_agents: Iterable[RecordedSubAgent]) -> None:
        for one in sub_agents:
            one.is_under_way = False

    def _add_to(self, run: str, body: Body, ns: int) -> None:
        if run not in self.found:
            parent, call_id = text_of(body.get("parent_run"), ""), text_of(body.get("parent_tool_call_id"), "")
            root = self.found[parent].root if parent in self.found else call_id
            agent, chars = text_of(body.get("agent"), "agent"), self.argument_chars.get((parent, call_id), 0)
            self.found[run] = RecordedSubAgent(run, parent, agent, root, ns, chars=chars)
        one, idx = self.found[run], count_of(body.get("idx"))
        if body.get("event") == "llm-begin" and idx is not None:
            one.prompt_chars[idx] = one.chars
        elif body.get("event") == "run-end" and body.get("outcome") in get_args(Outcome):
            one.outcome = cast("Outcome", body["outcome"])
            failed = one.outcome in ERROR_OUTCOMES
            one.error_type = text_of(body.get("error_type"), "_OTHER") if failed else None
        one.chars += _count_chars(body)


def _count_chars(body: Body) -> int:
    value = next((body[name] for name in ("content", "content_delta", "args") if body.get(name)), "")
    try:
        return len(value if isinstance(value, str) else orjson.dumps(value))
    except orjson.JSONEncodeError:  # nested too deeply
        return 0
