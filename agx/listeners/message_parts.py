"""Bodies of the stream as pydantic-ai's message parts: the other direction of `agx/stream/events.py`."""

from __future__ import annotations

import base64
from contextlib import suppress
from typing import Any, Literal, cast

import orjson
from pydantic import ValidationError
from pydantic_ai.messages import (
    BinaryContent,
    FilePart,
    ModelResponsePart,
    NativeToolCallPart,
    NativeToolReturnPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
)

from ..stream.custom_events import load_chunk
from ..stream.entry import Body
from ..stream.events import TOOL_OUTCOMES

_Outcome = Literal["success", "failed", "denied", "interrupted", "retried"]
_OUTCOMES: dict[object, _Outcome] = {ours: cast("_Outcome", theirs) for theirs, ours in TOOL_OUTCOMES.items()}


def load_part(body: Body) -> ModelResponsePart | None:
    """Return the part of a `part_start`; None where the stream does not hold what it is made of."""
    kind = body.get("part_kind")
    name, call_id = str(body.get("tool_name", "")), str(body.get("tool_call_id", ""))
    if kind == "text":
        return TextPart(str(body.get("content", "")))
    if kind == "thinking":
        return ThinkingPart(str(body.get("content", "")))
    if kind == "tool-call":
        return ToolCallPart(name, _load_args(body), call_id)
    if kind == "builtin-tool-call":
        return NativeToolCallPart(name, _load_args(body), call_id)
    if kind == "file" and isinstance(body.get("data"), str) and "truncated" not in body:
        return FilePart(BinaryContent(base64.b64decode(body["data"]), media_type=str(body.get("media_type"))))
    if kind == "builtin-tool-return":
        return NativeToolReturnPart(name, body.get("content"), call_id, outcome=_load_outcome(body))
    return None


def load_return(body: Body) -> ToolReturnPart:
    """Return the result of a tool call."""
    return ToolReturnPart(
        tool_name=str(body.get("tool_name", "")),
        content=body.get("content"),
        tool_call_id=str(body.get("tool_call_id", "")),
        outcome=_load_outcome(body),
        metadata=_load_chunks(body),
    )


def _load_outcome(body: Body) -> _Outcome:
    return _OUTCOMES.get(body.get("tool_outcome"), "success")


def _load_chunks(body: Body) -> list[Any] | None:
    """Return the chunks for front ends that a tool returned; None where there are none, or their size was cut."""
    chunks = body.get("chunks")
    if not isinstance(chunks, list):
        return None
    loaded = []
    for chunk in chunks:
        with suppress(ValidationError, ImportError, AttributeError):  # another protocol's, not installed here
            loaded.append(load_chunk(chunk))
    return loaded or None


def _load_args(body: Body) -> str | dict[str, Any]:
    args = body.get("args")
    if isinstance(args, dict):
        return args["raw"] if args.keys() == {"raw"} and isinstance(args["raw"], str) else args
    # Cut for their size (`"truncated": true`).
    return args if isinstance(args, str) else orjson.dumps(args).decode()
