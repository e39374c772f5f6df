"""The attempts of a run, read from its stream: which of them made progress. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ..stream.entry import RUNTIME, StreamEntry

_REQUEST = "request"  # a model request, among the names of steps; a tool's name has a prefix


@dataclass(frozen=True, slots=True)
class Attempt:
    """One process's try at a run.

    Args:
        progressed: whether it completed a step, and did not stop in a step in which the attempt before had stopped.
        handed_over: whether its process stopped on purpose, at a deploy.
    """

    progressed: bool
    handed_over: bool = False


def read_attempts(entries: Sequence[StreamEntry], *, handed_over: bool = False) -> tuple[Attempt, ...]:
    """Return a run's attempts in their order.

    Args:
        entries: of the run's stream, or of its end.
        handed_over: whether the process of the last attempt handed the run over; for the others the stream shows it.
    """
    attempts: list[Attempt] = []
    steps: _Steps | None = None
    for entry in entries:
        if entry.is_users or entry.is_from_sub_agent:
            continue
        if entry.type in ("begin", "resume") and entry.origin == RUNTIME:
            if steps is not None:
                attempts.append(Attempt(steps.has_progressed, entry.body.get("handed_over") is True))
            steps = _Steps() if steps is None else steps.next_attempt()
        elif entry.type == "event" and steps is not None:
            steps.add(entry.body)
    if steps is not None:
        attempts.append(Attempt(steps.has_progressed, handed_over))
    return tuple(attempts)


def count_failed(attempts: Sequence[Attempt]) -> int:
    """Return how many attempts in a row, the last ones, made no progress; those that were handed over do not count."""
    tried = [attempt for attempt in attempts if attempt.progressed or not attempt.handed_over]
    return sum(1 for _ in takewhile(lambda attempt: not attempt.progressed, reversed(tried)))


@dataclass(slots=True)
class _Steps:
    """The steps of one attempt, model requests and tool calls.

    A request that is sent again, and a call that is only reported as interrupted, are no progress: a run that stops its
    process each time does that much in each attempt.
    """

    stopped_before: frozenset[str] = frozenset()  # steps in which the attempt before stopped
    interrupted: frozenset[str] = frozenset()  # ids of calls that were under way then
    is_asking: bool = False
    called: dict[str, str] = field(default_factory=dict)  # by call id: step, of the response that is under way
    under_way: dict[str, str] = field(default_factory=dict)  # by call id: step
    done: set[str] = field(default_factory=set)

    def add(self, body: dict[str, Any]) -> None:
        """Take an event."""
        what, call_id = body.get("event"), body.get("tool_call_id")
        if what == "llm-begin":
            self.is_asking, self.called = True, {}
        elif what == "llm-end":
            self.is_asking = False
            self.done.add(_REQUEST)
            self.under_way |= self.called
        elif not isinstance(call_id, str):
            return
        elif what == "answer":  # an output tool: nothing executes it
            self.called.pop(call_id, None)
            self.under_way.pop(call_id, None)
        elif body.get("part_kind") == "tool-call":
            self.called[call_id] = f"tool {body.get('tool_name')}"
        elif body.get("part_kind") == "tool-return":
            self.under_way.pop(call_id, None)
            if body.get("tool_outcome") != "error" or call_id not in self.interrupted:
                self.done.add(f"tool {body.get('tool_name')}")

    @property
    def stopped(self) -> frozenset[str]:
        """The steps that were under way last."""
        return frozenset([*self.under_way.values(), *([_REQUEST] if self.is_asking else [])])

    @property
    def has_progressed(self) -> bool:
        return bool(self.done) and not (self.stopped & self.stopped_before) - self.done

    def next_attempt(self) -> _Steps:
        """Return the steps of the attempt that follows, which has the calls that were under way here."""
        return _Steps(self.stopped, frozenset(self.under_way), under_way=dict(self.under_way))
