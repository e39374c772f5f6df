"""Events that pydantic-ai passes on without looking into them, as bodies of the stream, and back. Pure, no I/O.

That is what an application or a capability emits (`ctx.emit()`), what a tool returns for the front end only
(`ToolReturn.metadata`), and changes of the run's messages, tools and settings. The schema: docs/reference/events.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_ai.messages import (
    AgentStreamEvent,
    BaseToolReturnPart,
    CapabilityEvent,
    CustomEvent,
    EnqueuedMessagesEvent,
    ModelMessage,
    ModelRequest,
    UnknownCapabilityEvent,
    UnknownCustomEvent,
)

from .entry import Body

logger = logging.getLogger("agx")

# Changes that pydantic-ai reports about the run itself. Not every version that agx allows has all of them.
_CHANGES = frozenset({"enqueued_messages", "tool_availability_delta", "capability_load_delta", "model_settings_delta"})
# Of an enqueued request; the others are instructions of the service, which its users must not see.
_SHOWN_PARTS = frozenset({"user-prompt", "tool-return", "retry-prompt"})
_ENVELOPE = frozenset({"kind", "event_kind", "capability_id", "tool_call_id", "tool_name"})

# Chunks of a front end's protocol: where their classes are, and what upstream passes on of them.
_VERCEL_AI, _AG_UI = "vercel-ai", "ag-ui"
_VERCEL_MODULE, _AG_UI_MODULE = "pydantic_ai.ui.vercel_ai.response_types", "ag_ui.core"
_VERCEL_CHUNKS = ("DataChunk", "SourceUrlChunk", "SourceDocumentChunk", "FileChunk")


@dataclass(kw_only=True)
class StreamedEvent(CustomEvent, name="agx-streamed"):
    """A custom event as a replay gives it: under the `name` of the class that the application emitted.

    Args:
        payload: what its `to_payload()` returned.
    """

    payload: Any = None

    def to_payload(self) -> Any:
        """Return the payload as the application's event gave it."""
        return self.payload


def dump_event(event: object) -> Body | None:
    """Return the body of a custom event, a capability's or a change of the run; None for any other event.

    A custom event that is not for front ends (`ui=False`) has no body: listeners are front ends. An event that can't
    be dumped is logged and has none, either.
    """
    try:
        if isinstance(event, CustomEvent):
            return _dump_custom(event) if event.ui and not isinstance(event, UnknownCustomEvent) else None
        if isinstance(event, CapabilityEvent):
            return _dump_capability(event)
        if getattr(event, "event_kind", None) in _CHANGES:
            return _dump_change(event)
    except Exception as error:  # `to_payload()` is the application's, and the run goes on
        logger.warning("agx: an event of type %s can't be streamed (%s)", type(event).__name__, type(error).__name__)
    return None


def load_event(body: Body) -> AgentStreamEvent | None:
    """Return the event of a body that `dump_event()` made; None where this process can't restore it."""
    kind, name, payload = body.get("kind"), body.get("name"), body.get("payload")
    call_id, tool = body.get("tool_call_id"), body.get("tool_name")
    try:
        if kind == "custom":
            chunk = body.get("chunk")
            payload = payload if chunk is None else load_chunk(chunk)
            custom = StreamedEvent(payload=payload, tool_call_id=call_id, tool_name=tool)
            custom.name = str(name)
            return custom
        if kind == "capability":
            known = {"event_kind": kind, "kind": name, "capability_id": body.get("capability_id")}
            known |= {"tool_call_id": call_id, "tool_name": tool}
            # Made anew each time: it has the event classes that are defined by now.
            return TypeAdapter(CapabilityEvent).validate_python({**(payload or {}), **known})
        if kind in _CHANGES:
            change: AgentStreamEvent = _change_adapter().validate_python({**(payload or {}), "event_kind": kind})
            return change
    except (ValidationError, TypeError, ImportError):
        logger.warning("agx: a stored event of kind %.40s can't be replayed", kind)
    return None


def dump_chunks(part: BaseToolReturnPart) -> list[Body]:
    """Return what a tool returned for front ends only: chunks of their protocols, from its metadata or its content.

    Other metadata is the application's own, and stays in the messages.
    """
    found = part.metadata or part.content
    if isinstance(found, str | bytes) or not isinstance(found, Iterable | BaseModel):
        return []
    items = [found] if isinstance(found, BaseModel) else found if isinstance(found, Sequence) else []
    return [chunk for item in items if (chunk := dump_chunk(item)) is not None]


def dump_chunk(value: object) -> Body | None:
    """Return a chunk as `{"protocol", "data"}`; None for any other value."""
    for protocol, classes in _chunk_classes():
        if isinstance(value, classes) and isinstance(value, BaseModel):
            return {"protocol": protocol, "data": value.model_dump(mode="json", by_alias=True, exclude_none=True)}
    return None


def load_chunk(chunk: Body) -> Any:
    """Return the chunk that `dump_chunk()` dumped.

    Raises:
        ValidationError: it is none.
        ImportError: its protocol is not installed here.
    """
    if chunk.get("protocol") == _AG_UI:
        from ag_ui.core import Event  # noqa: PLC0415 - it is an extra's

        return TypeAdapter(Event).validate_python(chunk.get("data"))
    from pydantic_ai.ui.vercel_ai import response_types as chunks  # noqa: PLC0415 - only where it is used

    union = chunks.SourceUrlChunk | chunks.SourceDocumentChunk | chunks.FileChunk | chunks.DataChunk
    return TypeAdapter[Any](union).validate_python(chunk.get("data"))


def _chunk_classes() -> Iterator[tuple[str, tuple[type, ...]]]:
    # Code that makes a chunk has imported its class: nothing is imported here that the application does not use.
    if (vercel := sys.modules.get(_VERCEL_MODULE)) is not None:
        yield _VERCEL_AI, tuple(getattr(vercel, name) for name in _VERCEL_CHUNKS)
    if (ag_ui := sys.modules.get(_AG_UI_MODULE)) is not None:
        yield _AG_UI, (ag_ui.BaseEvent,)


def _dump_custom(event: CustomEvent) -> Body:
    payload = event.to_payload()
    body: Body = {"kind": "custom", "name": event.name} | _origin(event)
    chunk = dump_chunk(payload)
    return body | ({"payload": payload} if chunk is None else {"chunk": chunk})


def _dump_capability(event: CapabilityEvent) -> Body:
    if isinstance(event, UnknownCapabilityEvent):
        payload = dict(event.data or {})
    else:
        payload = {one.name: getattr(event, one.name) for one in fields(event) if one.name not in _ENVELOPE}
    body: Body = {"kind": "capability", "name": event.kind, "capability_id": event.capability_id}
    return body | _origin(event) | {"payload": payload}


def _dump_change(event: Any) -> Body:
    if isinstance(event, EnqueuedMessagesEvent):
        event = replace(event, messages=tuple(_without_instructions(event.messages)), parts=())
    assert is_dataclass(event)
    payload = _change_adapter().dump_python(event, mode="json")
    return {"kind": payload.pop("event_kind"), "payload": payload}


def _origin(event: CustomEvent | CapabilityEvent) -> Body:
    return {"tool_call_id": event.tool_call_id, "tool_name": event.tool_name} if event.tool_call_id else {}


def _without_instructions(messages: Iterable[ModelMessage]) -> Iterator[ModelMessage]:
    for message in messages:
        if not isinstance(message, ModelRequest):
            yield message
        elif parts := [part for part in message.parts if part.part_kind in _SHOWN_PARTS]:
            yield replace(message, parts=parts, instructions=None)


@cache
def _change_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(AgentStreamEvent)
