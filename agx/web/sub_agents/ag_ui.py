"""Sub-agents for AG-UI: AG-UI's own events for them, and `subagentRunId` on each of their steps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ag_ui.core import BaseEvent, SubagentErrorEvent, SubagentFinishedEvent, SubagentStartedEvent
from pydantic_ai.messages import PartStartEvent
from pydantic_ai.ui.ag_ui import AGUIEventStream

from ...error_codes import RUN_CANCELED, RUN_FAILED
from ...listeners.replayed_run import SubAgentEvent


@dataclass
class ThreadEventStream(AGUIEventStream[Any, Any]):
    """pydantic-ai's event stream, and the steps of sub-agents for clients of AG-UI 1.0, which know these events."""

    _sub_agents: dict[str, AGUIEventStream[Any, Any]] = field(default_factory=dict, init=False)  # by run

    async def handle_event(self, event: Any) -> AsyncIterator[BaseEvent]:
        """Yield the events of an event."""
        if not isinstance(event, SubAgentEvent):
            async for one in super().handle_event(event):
                yield one
        elif self._knows_sub_agents():
            async for one in self._show(event):
                yield one

    def _knows_sub_agents(self) -> bool:
        declared = None if self.run_input is None else self.run_input.protocol_version
        return declared is not None and not declared.startswith("0.")

    async def _show(self, event: SubAgentEvent) -> AsyncIterator[BaseEvent]:
        if event.end is not None:
            if self._sub_agents.pop(event.run, None) is not None:  # else it had ended, and is void now
                yield _end(event.run, event.end)
            return
        if (stream := self._sub_agents.get(event.run)) is None:
            self._sub_agents[event.run] = stream = AGUIEventStream(ag_ui_version=self.ag_ui_version)
            yield SubagentStartedEvent(
                subagent_run_id=event.run,
                name=event.agent,
                parent_subagent_run_id=event.parent_run if event.depth > 1 else None,
                parent_tool_call_id=event.parent_tool_call_id,
            )
        if event.event is None:
            return
        if isinstance(event.event, PartStartEvent) and event.event.previous_part_kind is None:
            async for one in stream.before_response():
                yield one
        async for one in stream.handle_event(event.event):
            if "subagent_run_id" in type(one).model_fields:
                one.subagent_run_id = event.run  # type: ignore[attr-defined]
            yield one


def _end(run: str, end: dict[str, Any]) -> BaseEvent:
    if end.get("outcome") == "completed":
        return SubagentFinishedEvent(subagent_run_id=run)
    default = RUN_CANCELED if end.get("outcome") == "cancelled" else RUN_FAILED
    return SubagentErrorEvent(
        subagent_run_id=run,
        message=str(end.get("msg", default.sentence)),
        code=str(end.get("code", default.code)),
    )
