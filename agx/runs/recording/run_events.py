"""The events of one run: appended to its session's stream, or to that of its caller; and sampled for its span."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from pydantic_ai.messages import PartDeltaEvent

from ...facts.event_sample import EventSample
from ...facts.schema import StreamTotals
from ...redis.retry import reply_timeout
from ...stream.entry import AGENT, SUB_AGENT, Body, When, has_visible_text
from ...stream.events import Runtime, WireEvent
from ..state import RunState

if TYPE_CHECKING:
    from ...stream.writer import SessionWriter


class RunEvents:
    """Hands the events of a run to its writer, in their order. Without a writer, and in a fenced run, it drops them."""

    def __init__(self, state: RunState, runtime: Runtime) -> None:
        self.writer: SessionWriter | None = None  # None where the run is observed, not streamed
        self.runtime = runtime
        self.sample = EventSample()
        self.earlier = StreamTotals()  # written by earlier attempts
        self.first_text_ns: int | None = None  # when the first text was given to the writer
        self.stream_state = state  # of the run whose stream it is
        self._state = state

    @property
    def totals(self) -> StreamTotals | None:
        """What all attempts have written; None for a run that is not streamed."""
        return None if self.writer is None else self.earlier + self.writer.totals

    def put(self, type: str, origin: str, body: Body, *, when: When = "soon", checkpoint: bytes | None = None) -> None:
        """Append an event."""
        if self.writer is None or self._state.fenced:
            return
        now = time.time_ns()
        self.sample.add(now, type, body)
        if self.first_text_ns is None and type == "event" and has_visible_text(body):
            self.first_text_ns, when = now, "now"
        self.writer.put(type, origin, body, when=when, checkpoint=checkpoint)

    def put_wire(self, event: WireEvent, checkpoint: bytes | None = None) -> None:
        """Append an event of the agent's."""
        when = event.when if checkpoint is None else "now"
        self.put("event", AGENT, event.body, when=when, checkpoint=checkpoint)

    def put_delta(self, event: PartDeltaEvent, text: str) -> None:
        """Append a part of an answer."""
        if self.writer is not None:
            part = self.runtime.parts.get(event.index) or self.runtime.part_of(event)
            if is_first := self.first_text_ns is None and part.part_kind == "text":
                self.first_text_ns = time.time_ns()
            self.writer.put_delta(AGENT, part, text, is_first=is_first)

    async def wait_recorded(self) -> None:
        """Wait until the checkpoints so far are acknowledged; in an outage at most as long as for a reply."""
        if self.writer is not None:
            with contextlib.suppress(TimeoutError):
                async with reply_timeout():
                    await self.writer.drain()


class SubAgentEvents(RunEvents):
    """Appends the events of a sub-agent to the stream of the run that called it, with tags that name the sub-agent.

    They have the origin `sub-agent`. They are no part of that run's sample, and its measurements ignore them.
    """

    def __init__(self, state: RunState, caller: RunEvents, tags: Body) -> None:
        super().__init__(state, Runtime(tags=tags))
        self.writer = caller.writer
        self.stream_state = caller.stream_state
        self._error: Body = {}

    @property
    def totals(self) -> None:
        """None: the totals of the caller's stream include these events."""
        return None

    def put(self, type: str, origin: str, body: Body, *, when: When = "soon", checkpoint: bytes | None = None) -> None:
        """Append an event of a step, `run-begin` or `run-end`; leave out an `info`, which only the run itself emits."""
        if type == "error":
            self._error = body
        elif type == "begin":
            body = {"event": "run-begin"}
        elif type == "end":
            body = {"event": "run-end", "outcome": body["outcome"], "reason": body["reason"], **self._error}
        if type in ("event", "begin", "end") and self.writer is not None and self.stream_state.is_open:
            self.writer.put("event", SUB_AGENT, body | self.runtime.tags, when=when)

    def put_delta(self, event: PartDeltaEvent, text: str) -> None:
        """Append a part of an answer, unless the run that called the sub-agent has ended."""
        if self.writer is not None and self.stream_state.is_open:
            part = self.runtime.parts.get(event.index) or self.runtime.part_of(event)
            self.writer.put_delta(SUB_AGENT, part, text)


def open_sub_agent(
    state: RunState, caller: RunEvents, *, run: str, parent_run: str, agent: str, call_id: str
) -> RunEvents:
    """Return the events of a sub-agent that runs in a tool call of its caller."""
    tags: Body = {
        "run": run,
        "parent_run": parent_run,
        "agent": agent,
        "parent_tool_call_id": call_id,
        "depth": caller.runtime.tags.get("depth", 0) + 1,
    }
    return SubAgentEvents(state, caller, tags)
