"""What a listener has received of one run: for the screen, and for the comparison of a run in another process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..facts.schema import ToolOutcome
from ..stream.entry import SUB_AGENT
from .finished_runs import FinishedRun


@dataclass(slots=True)
class RunView:
    """One run, as its events show it.

    Args:
        began: `time.perf_counter()` at its `begin`; before that, when it was started.
        calls: by tool call id, what was called and its outcome.
        tool_calls: the calls that have returned, by tool and outcome.
        text: of all answers, without what is void.
        note: what happened to its process.
        finished: None while it is live.
        finished_at: `time.perf_counter()` at its end.
    """

    scope: str
    user: str
    session: str
    agent: str
    prompt: str
    began: float = field(default_factory=time.perf_counter)
    calls: dict[str, tuple[str, str]] = field(default_factory=dict)
    tool_calls: Counter[tuple[str, ToolOutcome]] = field(default_factory=Counter)
    text: str = ""
    thinking: bool = False
    note: str = ""
    finished: FinishedRun | None = None
    finished_at: float = 0.0
    _text_before: dict[int, int] = field(default_factory=dict)  # by model request: length of the text before its answer

    @property
    def model_requests(self) -> int:
        return len(self._text_before)

    def show(self, event: Mapping[str, Any]) -> None:
        """Add an event."""
        body: dict[str, Any] = event["body"]
        if event["type"] == "resume":
            self._drop(body["void"])
            return
        if event["origin"] == SUB_AGENT:
            return
        kind = body.get("part_kind")
        if body.get("event") == "llm-begin":
            self._text_before[body["idx"]] = len(self.text)
        elif kind in ("text", "thinking"):
            self.thinking = kind == "thinking"
            if not self.thinking:
                self.text += body.get("content", "") + body.get("content_delta", "")
        elif kind == "tool-call":
            self.thinking = False
            args = ", ".join(str(value) for value in body["args"].values())
            self.calls[body["tool_call_id"]] = f"{body['tool_name']}({args})", "…"
        elif (call_id := body.get("tool_call_id")) in self.calls and "tool_outcome" in body:
            self.calls[call_id] = self.calls[call_id][0], body["tool_outcome"]
            self.tool_calls[body["tool_name"], body["tool_outcome"]] += 1

    def finish(self, run: FinishedRun) -> None:
        """The run has ended."""
        self.finished, self.finished_at = run, time.perf_counter()

    def _drop(self, void: Mapping[str, int] | None) -> None:
        """Drop the answer that the killed process had begun: the next process asks the model again."""
        if void is not None:
            self.text = self.text[: self._text_before[void["idx"]]]
