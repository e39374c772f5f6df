"""The state of one run: its phase, the transitions between phases, and why it has to stop.

The picture and the meaning of each transition: docs/design.md, "A run's life". A run that another process takes over is
fenced here; whatever that process does with it has a state of its own there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..facts.schema import Reason

Phase = Literal["opening", "live", "cancelling", "ending", "ended", "reported", "recovered", "fenced", "handed_over"]
Step = Literal["begin", "cancel", "end", "acknowledge", "report", "recover", "fence", "hand_over"]

# What may follow; everything else is refused.
TRANSITIONS: dict[tuple[Phase, Step], Phase] = {
    ("opening", "cancel"): "opening",
    ("opening", "begin"): "live",
    ("live", "cancel"): "cancelling",
    ("live", "end"): "ending",
    ("cancelling", "end"): "ending",
    ("ending", "acknowledge"): "ended",
    ("ended", "report"): "reported",
    ("ended", "recover"): "recovered",
    ("live", "hand_over"): "handed_over",
    ("cancelling", "hand_over"): "handed_over",
    ("opening", "fence"): "fenced",
    ("live", "fence"): "fenced",
    ("cancelling", "fence"): "fenced",
    ("ending", "fence"): "fenced",
    ("fenced", "acknowledge"): "ended",  # `end` stands in the stream: that decides, whatever became of the lease
    ("fenced", "begin"): "fenced",
    ("fenced", "end"): "fenced",
}


class TransitionError(RuntimeError):
    """Raised when the runtime takes a step that the run's phase does not allow: a defect of agx."""


class RunState:
    """Where one run stands, and whether this process still owns it. A sub-agent's run follows its parent's."""

    def __init__(self, parent: RunState | None = None) -> None:
        self.phase: Phase = "opening"
        self.cancel_ms: int | None = None  # server time of `cancel()`'s mark
        self.end_ms: int | None = None  # server time of the `end` entry
        self.on_stop: Callable[[], None] | None = None  # called when the agent has to stop
        self.is_confirmed: Callable[[], bool] | None = None  # whether the lease was confirmed in time; None without one
        self._parent = parent
        self._cancel_reason: Reason | None = None

    # --- what this process does: a step that is not allowed is a defect ---

    def begin(self) -> None:
        """`begin` is acknowledged; a cancellation that came before takes effect now."""
        self._take("begin")
        if self._cancel_reason is not None and self.phase == "live":
            self._take("cancel")

    def end(self) -> None:
        """The agent is done, and the last events are handed over."""
        self._take("end")

    def report(self) -> None:
        """The fact of how the run ended is handed over."""
        self._take("report")

    def recover(self) -> None:
        """A sidecar has emitted how the run ended: this process emits nothing more."""
        self._take("recover")

    def hand_over(self) -> None:
        """Another process goes on with the run: this one writes and emits nothing more."""
        self._take("hand_over")

    # --- what happens to the run: it may come at any time, and is ignored where it is too late ---

    def cancel(self, reason: Reason, mark_ms: int | None = None) -> None:
        """Ask the run to stop; the first reason holds."""
        if self._cancel_reason is None and (self.phase, "cancel") in TRANSITIONS:
            self._cancel_reason, self.cancel_ms = reason, mark_ms
            self._take("cancel")
            self._stop()

    def acknowledge(self, end_ms: int | None = None) -> None:
        """The server has the run's `end`, if the run has a stream."""
        if (self.phase, "acknowledge") in TRANSITIONS:
            self._take("acknowledge")
            self.end_ms = end_ms

    def fence(self) -> None:
        """Another run or a sidecar has taken the session over: this one writes and emits nothing more."""
        if (self.phase, "fence") in TRANSITIONS:
            self._take("fence")
            self._stop()

    def _take(self, step: Step) -> None:
        after = TRANSITIONS.get((self.phase, step))
        if after is None:
            raise TransitionError(f"a run that is {self.phase} cannot {step}")
        self.phase = after

    def _stop(self) -> None:
        if self.on_stop is not None:
            self.on_stop()

    # --- questions ---

    @property
    def cancel_reason(self) -> Reason | None:
        """Why the run was cancelled, or the run in whose tool it works."""
        if self._cancel_reason is None and self._parent is not None:
            return self._parent.cancel_reason
        return self._cancel_reason

    @property
    def must_stop(self) -> bool:
        """Whether the agent has to stop: it was cancelled, or fenced."""
        return self._cancel_reason is not None or self.fenced

    @property
    def is_open(self) -> bool:
        """Whether the agent may still be at work."""
        return self.phase in ("opening", "live", "cancelling", "fenced")

    @property
    def fenced(self) -> bool:
        """Whether another run or a sidecar has taken this run's session over, or its parent's."""
        return self.phase == "fenced" or (self._parent is not None and self._parent.fenced)

    @property
    def suppressed(self) -> bool:
        """Whether another process emits how this run ended: then its facts are dropped here."""
        if self.phase in ("fenced", "recovered", "handed_over"):
            return True
        return self._parent is not None and self._parent.suppressed

    @property
    def confirmed(self) -> bool:
        """Whether no other process can have finished the run by now. Until then its facts wait."""
        if self.phase == "reported" or self.is_confirmed is None:
            return self._parent is None or self._parent.confirmed
        return self.is_confirmed()
