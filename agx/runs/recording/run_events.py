"""The events of one run: appended to its session's stream, and sampled for its span."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from pydantic_ai.messages import PartDeltaEvent

from ...facts.event_sample import EventSample
from ...facts.schema import StreamTotals
from ...redis.retry import COMMAND_TIMEOUT
from ...stream.entry import AGENT, has_visible_text
from ...stream.events import Body, Runtime, WireEvent
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
        self.first_text_ns: int | None = None  # when the first text for listeners was handed over
        self._state = state

    @property
    def totals(self) -> StreamTotals | None:
        """What all attempts have written; None for a run that is not streamed."""
        return None if self.writer is None else self.earlier + self.writer.totals

    def put(self, type: str, origin: str, body: Body, *, urgent: bool = False, checkpoint: bytes | None = None) -> None:
        """Append an event."""
        if self.writer is None or self._state.fenced:
            return
        now = time.time_ns()
        self.sample.add(now, type, body)
        if self.first_text_ns is None and type == "event" and has_visible_text(body):
            self.first_text_ns = now
        self.writer.put(type, origin, body, urgent=urgent, checkpoint=checkpoint)

    def put_wire(self, event: WireEvent, checkpoint: bytes | None = None) -> None:
        """Append an event of the agent's."""
        self.put("event", AGENT, event.body, urgent=event.urgent or checkpoint is not None, checkpoint=checkpoint)

    def put_delta(self, event: PartDeltaEvent, text: str) -> None:
        """Append a part of an answer."""
        if self.writer is not None:
            part = self.runtime.parts.get(event.index) or self.runtime.part_of(event)
            if self.first_text_ns is None and part.part_kind == "text":
                self.first_text_ns = time.time_ns()
            self.writer.put_delta(AGENT, part, text)

    async def wait_recorded(self) -> None:
        """Wait until the checkpoints so far are acknowledged; in an outage at most as long as a command may take."""
        if self.writer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    await self.writer.drain()
