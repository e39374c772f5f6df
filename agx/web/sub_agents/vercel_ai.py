"""Sub-agents for the AI SDK: preliminary outputs of the tool calls in which they run, as the SDK's own sub-agents have.

Such an output is a whole UIMessage that replaces the one before. It is sent when its parts change, and each time its
text has grown by 1/64. So the bytes sent for a text grow with its length, not with the square of its length.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
)
from pydantic_ai.ui.vercel_ai import VercelAIEventStream
from pydantic_ai.ui.vercel_ai.response_types import BaseChunk, ToolOutputAvailableChunk

from ...listeners.replayed_run import SubAgentEvent
from ...stream.entry import Body
from ...stream.events import to_readable, tool_outcome

_SHARE = 64  # a message is sent again when its text has grown by 1/64

Call = tuple[str, str]  # a run and its tool call


@dataclass(slots=True)
class SubAgentMessages:
    """The messages of the sub-agents of one run, one for each tool call in which some run."""

    _calls: dict[str, Call] = field(default_factory=dict)  # by sub-agent's run: where it is
    _parts: dict[Call, list[Body]] = field(default_factory=dict)
    _tools: dict[Call, Body] = field(default_factory=dict)  # the parts of sub-agents' own tool calls
    _open: dict[str, Body] = field(default_factory=dict)  # by run: the text that grows
    _heads: dict[str, Body] = field(default_factory=dict)  # by run: the part that names the sub-agent
    _grown: dict[str, int] = field(default_factory=dict)  # by call of the run itself: characters that are not sent yet
    _sizes: dict[str, int] = field(default_factory=dict)  # the same, sent or not

    def read(self, event: object) -> Iterator[BaseChunk]:
        """Yield the chunks for an event of the replay."""
        if not isinstance(event, SubAgentEvent):
            return
        if event.end is not None and event.end.get("void"):
            self._heads.pop(event.run, None)
            self._parts.pop(self._calls.pop(event.run, ("", "")), None)
        else:
            root = self._add(event)
            grown, size = self._grown.get(root, 0), self._sizes.get(root, 0)
            if not isinstance(event.event, PartDeltaEvent) or grown * _SHARE >= size:
                self._grown[root] = 0
                yield ToolOutputAvailableChunk(
                    tool_call_id=root, output=self._message(self._root_call(event.run)), preliminary=True
                )

    def _add(self, event: SubAgentEvent) -> str:
        """Add an event to its message; returns the call of the run itself that shows it."""
        call = self._calls.setdefault(event.run, (event.parent_run, event.parent_tool_call_id))
        parts = self._parts.setdefault(call, [])
        if event.run not in self._heads:
            self._heads[event.run] = {"type": "data-agx-sub-agent", "data": event.to_payload()}
            parts.append(self._heads[event.run])
        if (tool := self._tools.get(call)) is not None:
            tool |= {"state": "output-available", "preliminary": True, "output": self._message(call)}
        root = self._root_call(event.run)[1]
        if event.end is not None:
            self._heads[event.run]["data"] |= event.end
        elif event.event is not None:
            self._add_step(event.run, event.event, parts, root)
        return root

    def _add_step(self, run: str, event: AgentStreamEvent, parts: list[Body], root: str) -> None:
        if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart | ThinkingPart):
            kind = "text" if isinstance(event.part, TextPart) else "reasoning"
            self._open[run] = {"type": kind, "text": event.part.content, "state": "streaming"}
            parts.append(self._open[run])
        elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta | ThinkingPartDelta):
            text = event.delta.content_delta or ""
            self._open[run]["text"] += text
            self._grown[root] = self._grown.get(root, 0) + len(text)
            self._sizes[root] = self._sizes.get(root, 0) + len(text)
        elif isinstance(event, PartEndEvent) and run in self._open:
            self._open.pop(run)["state"] = "done"
        elif isinstance(event, FunctionToolCallEvent):
            made = event.part
            tool = {"type": f"tool-{made.tool_name}", "toolCallId": made.tool_call_id, "state": "input-available"}
            self._tools[run, made.tool_call_id] = tool | {"input": to_readable(made.args_as_dict())}
            parts.append(self._tools[run, made.tool_call_id])
        elif isinstance(event, FunctionToolResultEvent):
            returned = event.part
            if (found := self._tools.pop((run, str(returned.tool_call_id)), None)) is not None:
                found.pop("preliminary", None)
                if tool_outcome(returned) == "ok":
                    found |= {"state": "output-available", "output": to_readable(returned.content)}
                else:
                    found |= {"state": "output-error", "errorText": str(returned.content)}
                    found.pop("output", None)

    def _root_call(self, run: str) -> Call:
        call = self._calls[run]
        while call[0] in self._calls:
            call = self._calls[call[0]]
        return call

    def _message(self, call: Call) -> Body:
        return {"id": f"{call[0]}-{call[1]}", "role": "assistant", "parts": self._parts[call]}


@dataclass
class ChatEventStream(VercelAIEventStream[Any, Any]):
    """pydantic-ai's event stream, and the steps of sub-agents."""

    _sub_agents: SubAgentMessages = field(default_factory=SubAgentMessages, init=False)

    async def handle_event(self, event: Any) -> AsyncIterator[BaseChunk]:
        """Yield the chunks of an event."""
        for chunk in self._sub_agents.read(event):
            yield chunk
        async for chunk in super().handle_event(event):
            yield chunk
