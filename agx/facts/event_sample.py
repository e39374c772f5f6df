"""A sample of a run's events, for its `agx.stream` span: the first and the last ones, without content."""

from __future__ import annotations

from collections import deque
from typing import Any

from .schema import StreamEvent

_AT_EACH_END = 64  # events

# The parts of a body that are no content.
_ATTRIBUTES = frozenset(
    ("idx", "part_kind", "tool_name", "tool_call_id", "tool_outcome", "outcome", "reason", "error_type")
)


class EventSample:
    """Keeps the first and the last events of a stream; never one per token (contract, section 5)."""

    def __init__(self) -> None:
        self._head: list[StreamEvent] = []
        self._tail: deque[StreamEvent] = deque(maxlen=_AT_EACH_END)
        self._count = 0

    @property
    def events(self) -> tuple[StreamEvent, ...]:
        return (*self._head, *self._tail)

    @property
    def between(self) -> int:
        """How many were left out between the first and the last."""
        return self._count - len(self._head) - len(self._tail)

    def add(self, at_ns: int, type: str, body: dict[str, Any]) -> None:
        """Take an entry of the stream; deltas are passed over."""
        what = str(body.get("event", type)) if type == "event" else type
        if what == "part_delta":
            return
        attributes = {
            name: value
            for name, value in body.items()
            # A fact's integers have 64 bits.
            if name in _ATTRIBUTES and (isinstance(value, str) or (isinstance(value, int) and value.bit_length() < 64))
        }
        event = StreamEvent(at_ns, "part" if what == "part_start" else what, attributes)
        self._count += 1
        if len(self._head) < _AT_EACH_END:
            self._head.append(event)
        else:
            self._tail.append(event)
