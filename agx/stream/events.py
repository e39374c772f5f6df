"""The wire vocabulary: pydantic-ai's events as bodies of the session stream (contract, section 4). Pure, no I/O."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic_ai.messages import (
    BaseToolCallPart,
    BaseToolReturnPart,
    FilePart,
    FinalResultEvent,
    ModelResponse,
    ModelResponsePart,
    NativeToolReturnPart,
    OutputToolResultEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolResultEvent,
    ToolReturnPart,
)
from pydantic_ai.models import Model
from pydantic_core import from_json, to_jsonable_python

from ..errors import BodyError
from ..facts.json_values import compact
from ..facts.schema import ToolOutcome
from .custom_events import dump_chunks, dump_event
from .entry import DEFERRED, PROMPT, SUB_AGENT, Body, When


class UserBody(dict[str, Any]):
    """A body that a user handed in, with `add()`, `add_info()` or `add_error()`: nothing in it is read or changed."""

    def is_ambiguous(self, origin: str) -> bool:
        """Whether an entry with this body could be taken for one of the runtime's own."""
        return "seq" in self or origin in (DEFERRED, PROMPT, SUB_AGENT)


_MOST_EXACT = 2**53 - 1  # JavaScript's numbers are exact up to here
_MOST_FILE = 131_072  # bytes of a file that are streamed; a larger one is in the messages only
_OVERHEAD = 64  # bytes that the marks of a cut body may add to its limit

TOOL_OUTCOMES: dict[str, ToolOutcome] = {
    "success": "ok",
    "retried": "retry",
    "failed": "error",
    "denied": "denied",
    "interrupted": "cancelled",
}


def tool_outcome(part: BaseToolReturnPart) -> ToolOutcome:
    """Return what became of a tool call, in agx's words."""
    return TOOL_OUTCOMES.get(part.outcome, "error")


@dataclass(frozen=True, slots=True)
class WireEvent:
    """An event as it goes to the stream."""

    body: Body
    when: When = "soon"


@dataclass(eq=False, slots=True)
class Part:
    """A part that deltas belong to; one object per part: deltas of the same object may be merged."""

    idx: int
    event_idx: int
    part_kind: str
    part_delta_kind: str
    tags: Body = field(default_factory=dict)

    def delta(self, text: str) -> Body:
        """Return the body of a part_delta."""
        return {
            "idx": self.idx,
            "event": "part_delta",
            "event_idx": self.event_idx,
            "part_kind": self.part_kind,
            "part_delta_kind": self.part_delta_kind,
            "content_delta": text,
            **self.tags,
        }


@dataclass(slots=True)
class Runtime:
    """What of a run has become events so far: the place between pydantic-ai's events and the wire."""

    idx: int = -1  # of the current model request, from 0
    open: bool = False  # between llm-begin and llm-end
    answered: bool = False  # the current model request gave the final answer
    returned: set[str] = field(default_factory=set)  # calls of it whose results an earlier attempt has appended
    parts: dict[int, Part] = field(default_factory=dict)  # by index, those of the current request that have deltas
    tags: Body = field(default_factory=dict)  # of a sub-agent's deltas

    @property
    def index(self) -> int:
        """Index of the current model request; 0 before the first one."""
        return max(self.idx, 0)

    def begin_node(self, model: Model[Any] | None = None) -> WireEvent:
        """A model request begins."""
        self.idx += 1
        self.open = True
        self.answered = False
        self.returned.clear()
        self.parts.clear()
        body: Body = {"idx": self.idx, "event": "llm-begin"}
        if model is not None:
            body |= {"model": model.model_name, "provider": model.system}
        return WireEvent(body, "later")  # listeners need it with the event after it

    def end_node(self) -> WireEvent:
        """The model request is over, however it ended."""
        self.open = False
        return WireEvent({"idx": self.idx, "event": "llm-end"}, "later")

    def convert(self, event: object) -> WireEvent | None:
        """Return the wire event of one of pydantic-ai's, or None where it has nothing new for a listener."""
        if isinstance(event, PartDeltaEvent):
            text = delta_text(event)
            return WireEvent(self.part_of(event).delta(text)) if text else None
        if isinstance(event, PartStartEvent):
            self.parts.pop(event.index, None)
            if isinstance(event.part, BaseToolCallPart):
                return None
            # A user waits for the first words of a response, so they do not wait for the next commit.
            return self._whole(event.index, event.part, "now")
        if isinstance(event, PartEndEvent):
            # A call is one event, whole: its arguments are complete only here. Results and files have no end.
            return self._whole(event.index, event.part) if isinstance(event.part, BaseToolCallPart) else None
        if isinstance(event, FinalResultEvent):
            return self.answer(event.tool_name, event.tool_call_id)
        if isinstance(event, OutputToolResultEvent) and event.part.tool_call_id in self.returned:
            return None
        if isinstance(event, ToolResultEvent):
            return WireEvent(self._part_start(None) | _return_fields(event.part), "now")
        if (body := dump_event(event)) is not None:
            return WireEvent({"idx": self.index, "event": "custom"} | body, "now")
        return None

    def part_of(self, event: PartDeltaEvent) -> Part:
        """Return the part that a text or thinking delta belongs to."""
        part = self.parts.get(event.index)
        if part is None:
            kind = event.delta.part_delta_kind
            part = self.parts[event.index] = Part(self.idx, event.index, kind, kind, self.tags)
        return part

    def convert_response(self, response: ModelResponse) -> list[WireEvent]:
        """Return the wire events of a response that came whole, from a model that does not stream."""
        return [self._whole(index, part) for index, part in enumerate(response.parts)]

    def answer(self, tool_name: str | None = None, tool_call_id: str | None = None) -> WireEvent:
        """The final answer was recognised; by an output tool's call, where one is named."""
        self.answered = True
        body: Body = {"idx": self.idx, "event": "answer"}
        if tool_name is not None:
            body |= {"tool_name": tool_name, "tool_call_id": tool_call_id}
        return WireEvent(body, "later")  # listeners need it with the event after it

    def _part_start(self, index: int | None) -> Body:
        # A call approved since the run before has its result before the first request.
        body: Body = {"idx": self.index, "event": "part_start"}
        return body if index is None else body | {"event_idx": index}

    def _whole(self, index: int, part: ModelResponsePart, when: When = "soon") -> WireEvent:
        body = self._part_start(index) | {"part_kind": part.part_kind}
        if isinstance(part, (TextPart, ThinkingPart)):
            body["content"] = part.content
        elif isinstance(part, BaseToolCallPart):
            body |= {"tool_name": part.tool_name, "tool_call_id": part.tool_call_id, "args": parse_args(part)}
        elif isinstance(part, NativeToolReturnPart):
            body |= _return_fields(part)
        elif isinstance(part, FilePart):
            body |= {"media_type": part.content.media_type, "size": len(part.content.data)}
            if len(part.content.data) <= _MOST_FILE:
                body["data"] = base64.b64encode(part.content.data).decode()
        return WireEvent(body, when)


def delta_text(event: PartDeltaEvent) -> str | None:
    """Return a delta's text; None for a tool call's delta: the call is one event, at its end."""
    delta = event.delta
    return delta.content_delta if isinstance(delta, (TextPartDelta, ThinkingPartDelta)) else None


def _return_fields(part: ToolReturnPart | NativeToolReturnPart) -> Body:
    body = {
        "part_kind": part.part_kind,
        "tool_name": part.tool_name,
        "tool_call_id": part.tool_call_id,
        "content": part.content,
        "tool_outcome": tool_outcome(part),
    }
    chunks = dump_chunks(part)
    return body | {"chunks": chunks} if chunks else body


def parse_args(part: BaseToolCallPart) -> Body:
    """Return a tool call's arguments as an object; `{"raw": text}` where they can't be parsed."""
    if not part.args:
        return {}
    if isinstance(part.args, dict):
        return dict(part.args)
    if not isinstance(part.args, str):  # as some providers send them
        return {"raw": part.args}
    try:
        args = from_json(part.args, allow_inf_nan=False)  # keeps every digit of an integer, which orjson does not
    except ValueError:
        return {"raw": part.args}
    return args if isinstance(args, dict) else {"raw": part.args}


def check_body(body: object) -> UserBody:
    """Return a body that a user handed in, if it is a JSON object; raises BodyError."""
    if not isinstance(body, dict):
        raise BodyError(f"it is a {type(body).__name__}")
    try:
        orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise BodyError(str(error)) from None
    return UserBody(body)


def check_label(name: str, value: object) -> None:
    """Refuse an event's `type` or `origin` that Redis can't store; raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"an event's {name} must be a str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"an event's {name} must be text that UTF-8 can encode, not {value!r}") from None


def encode_body(body: Body, limit: int) -> bytes:
    """Return a body as JSON of at most `limit` bytes; of a longer one the longest values are cut (`"truncated": true`).

    Never raises, whatever values tools and models return. Integers that JavaScript would round (beyond 2^53 - 1) become
    strings, except in a user's own body, which only `limit` changes.
    """
    data = _to_json(body)
    if len(data) <= limit:
        return data
    cut: Body = {_name(name): value if _is_scalar(value) else _text(value) for name, value in body.items()}
    texts = sorted((name for name, value in cut.items() if isinstance(value, str)), key=lambda name: -len(cut[name]))
    cut["truncated"] = True
    for name in texts:
        text = cut[name] = cut[name][:limit]
        while text and (excess := len(_to_json(cut)) - limit) > 0:
            # An escaped character takes up to six bytes, so one pass may cut too little, never too much by far.
            text = text[: -max(1, excess // 6)] if excess < len(text) else text[: len(text) // 2]
            cut[name] = text
    if isinstance(body.get("args"), dict):
        cut["args"] = {"raw": cut["args"]}  # an object still, as where they can't be parsed
    data = _to_json(cut)
    return data if len(data) <= limit + _OVERHEAD else b'{"truncated":true}'  # its names alone are too long


def _is_scalar(value: object) -> bool:
    # An integer may have thousands of digits, which can be cut only as text.
    return value is None or isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 64)


def _text(value: object) -> str:
    return _to_json({"": value}).decode()[len('{"":') : -1].strip()


def _to_json(body: Body) -> bytes:
    try:
        return compact(orjson.dumps(body, option=0 if isinstance(body, UserBody) else orjson.OPT_STRICT_INTEGER))
    except orjson.JSONEncodeError:
        return compact(orjson.dumps({_name(name): to_plain(value) for name, value in body.items()}))


def to_plain(value: object) -> Any:
    """Return a value as JSON has it, with what JSON can't hold replaced; never raises."""
    try:
        plain = to_readable(to_jsonable_python(value, serialize_unknown=True, bytes_mode="base64", fallback=repr))
        orjson.dumps(plain)
    except Exception as error:  # a tool's own type may raise anything while it is serialised
        return {"unserialisable": type(value).__name__, "error": type(error).__name__}
    return plain


def to_readable(value: Any) -> Any:
    """Return a value without what JSON's readers refuse or round: lone surrogates, NaN, integers beyond 2^53 - 1."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if abs(value) <= _MOST_EXACT else _digits(value)
    if isinstance(value, dict):
        return {to_readable(name): to_readable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_readable(item) for item in value]
    return value


def _name(name: object) -> str:
    return str(to_readable(name if isinstance(name, str) else to_plain(name)))


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python writes in decimal
        return hex(value)
