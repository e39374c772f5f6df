"""The catalogue of a session's events: source of the JSON Schema, of docs/reference/events.md and of types in agx.d.ts.

`docs/events.py` writes the last two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..stream.entry import AGENT, DEFERRED, PROMPT, RUNTIME, SUB_AGENT

_TEXT, _COUNT, _FLAG, _OBJECT, _ANY = "string", "integer", "boolean", "object", ""
_OR_NULL = " or null"


@dataclass(frozen=True, slots=True)
class EventField:
    """A field of a body. `type` is a JSON type, with `or null` where it may be null, and empty for any value."""

    name: str
    type: str
    meaning: str
    required: bool = True

    def to_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of its values."""
        schema: dict[str, Any] = {"description": self.meaning}
        if self.type:
            name = self.type.removesuffix(_OR_NULL)
            schema["type"] = name if name == self.type else [name, "null"]
        return schema


@dataclass(frozen=True, slots=True)
class EventKind:
    """A kind of event: what is constant in it, when it comes, and its fields. An empty `origin` is the user's own."""

    name: str
    type: str
    origin: str
    when: str
    fields: tuple[EventField, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)  # of the body
    example: dict[str, Any] = field(default_factory=dict)  # the rest of a body

    def to_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of such an event."""
        constants = {name: {"const": value} for name, value in self.constants.items()}
        body = {
            "type": "object",
            "properties": constants | {one.name: one.to_schema() for one in self.fields},
            "required": [*constants, *(one.name for one in self.fields if one.required)],
        }
        origin = {"const": self.origin} if self.origin else {"type": "string"}
        return {
            "title": self.name,
            "description": self.when,
            "type": "object",
            "properties": {"id": {"type": "string"}, "type": {"const": self.type}, "origin": origin, "body": body},
            "required": ["id", "type", "origin", "body"],
        }

    @property
    def body(self) -> dict[str, Any]:
        """An example of a body."""
        return self.constants | self.example


_IDX = EventField("idx", _COUNT, "The model request, counted from 0 in each run.")
_TOOL = (EventField("tool_name", _TEXT, "The tool."), EventField("tool_call_id", _TEXT, "The call."))
_TAGS = (
    EventField("run", _TEXT, "The sub-agent's run."),
    EventField("parent_run", _TEXT, "The run that called it."),
    EventField("agent", _TEXT, "Its agent's name."),
    EventField("parent_tool_call_id", _TEXT, "The tool call of `parent_run` that runs the sub-agent."),
    EventField("depth", _COUNT, "1 in a tool of the session's run, 2 in a tool of such a sub-agent, and so on."),
)
_TAGGED = {"run": "81c0", "parent_run": "5d2c", "agent": "scout", "parent_tool_call_id": "call_1", "depth": 1}
_CALL = {"tool_name": "look", "tool_call_id": "call_1"}


def _part(kind: str, when: str, fields: tuple[EventField, ...], example: dict[str, Any]) -> EventKind:
    constants = {"event": "part_start", "part_kind": kind}
    return EventKind(f"part_start: {kind}", "event", AGENT, when, (_IDX, *fields), constants, {"idx": 0, **example})


EVENTS = (
    EventKind(
        "begin",
        "begin",
        RUNTIME,
        "First. The entries of the session's run before are gone by now.",
        (
            EventField("session_id", _TEXT, "The session."),
            EventField("run_id", _TEXT, "The run.", required=False),
            EventField("agent", _TEXT, "The agent's name.", required=False),
            EventField("traceparent", _TEXT, "The run's place in its trace (W3C).", required=False),
            EventField("follows", _TEXT + _OR_NULL, "`traceparent` of what caused the run.", required=False),
        ),
        example={"session_id": "chat-1", "run_id": "5d2c", "agent": "support"},
    ),
    EventKind(
        "prompt",
        "info",
        PROMPT,
        "A router has started the run, or the model has got a message of `steer()`.",
        (
            EventField("prompt", _TEXT + _OR_NULL, "The text; null where the run goes on with decided calls."),
            EventField("steer", _FLAG, "True for a message of `steer()`.", required=False),
            EventField("id", _TEXT, "Of a message of `steer()`.", required=False),
            EventField("after", _COUNT, "How many stored messages come before it.", required=False),
            EventField("stamp", _TEXT, "pydantic-ai's id of the run, as in the stored messages.", required=False),
        ),
        example={"prompt": "Where is my order?", "after": 0, "stamp": "0199"},
    ),
    EventKind(
        "llm-begin",
        "event",
        AGENT,
        "A model request is sent.",
        (
            _IDX,
            EventField("model", _TEXT, "The model's name.", required=False),
            EventField("provider", _TEXT, "Its provider.", required=False),
        ),
        {"event": "llm-begin"},
        {"idx": 0, "model": "gpt-4o-mini", "provider": "openai"},
    ),
    _part(
        "text",
        "The answer's text begins; the rest comes as `part_delta`.",
        (EventField("content", _TEXT, "The text so far."),),
        {"content": "Your"},
    ),
    _part(
        "thinking",
        "The model's reasoning begins; the rest comes as `part_delta`.",
        (EventField("content", _TEXT, "The text so far."),),
        {"content": "The user"},
    ),
    _part(
        "tool-call",
        "The model calls a tool: one event with all arguments. A call of a provider's own tool is `builtin-tool-call`.",
        (*_TOOL, EventField("args", _OBJECT, 'The arguments; `{"raw": text}` where they are not JSON.')),
        {**_CALL, "args": {"where": "attic"}},
    ),
    _part(
        "tool-return",
        "A tool has returned. The result of a provider's own tool is `builtin-tool-return`.",
        (
            *_TOOL,
            EventField("content", _ANY, "The result."),
            EventField("tool_outcome", _TEXT, "`ok`, `retry`, `error`, `denied` or `cancelled`."),
            EventField("chunks", "array", "What the tool returned for the front end only.", required=False),
        ),
        {**_CALL, "content": "nothing", "tool_outcome": "ok"},
    ),
    _part(
        "file",
        "The model answers with a file.",
        (
            EventField("media_type", _TEXT, "Its type."),
            EventField("size", _COUNT, "Its bytes."),
            EventField("data", _TEXT, "Its content in base64, up to 128 KiB.", required=False),
        ),
        {"media_type": "image/png", "size": 70, "data": "iVBORw0KGgo="},
    ),
    EventKind(
        "part_delta",
        "event",
        AGENT,
        "More of a text or of reasoning. Several that wait may be merged.",
        (
            _IDX,
            EventField("content_delta", _TEXT, "The text to append."),
            EventField("part_kind", _TEXT, "`text` or `thinking`."),
            EventField("part_delta_kind", _TEXT, "The same, for clients of the older package."),
        ),
        {"event": "part_delta"},
        {"idx": 0, "part_kind": "text", "part_delta_kind": "text", "content_delta": " order"},
    ),
    EventKind(
        "answer",
        "event",
        AGENT,
        "The final answer is recognized; again after a retry of the output.",
        (_IDX, *(EventField(one.name, one.type, "Of the output tool that gave it.", required=False) for one in _TOOL)),
        {"event": "answer"},
        {"idx": 0},
    ),
    EventKind(
        "llm-end",
        "event",
        AGENT,
        "A model request is over, however it ended.",
        (_IDX,),
        {"event": "llm-end"},
        {"idx": 0},
    ),
    EventKind(
        "custom",
        "event",
        AGENT,
        "What pydantic-ai passes on without looking into it (below).",
        (
            _IDX,
            EventField("kind", _TEXT, "Where it comes from."),
            EventField("name", _TEXT, "The event's name.", required=False),
            EventField("payload", _ANY, "Its content.", required=False),
            EventField("chunk", _OBJECT, "In place of `payload`: a chunk of a front end's protocol.", required=False),
        ),
        {"event": "custom"},
        {"idx": 0, "kind": "custom", "name": "progress", "payload": {"percent": 40}},
    ),
    EventKind(
        "of a sub-agent",
        "event",
        SUB_AGENT,
        "A step of an agent that runs in a tool: an event as above, with fields that name the sub-agent.",
        (EventField("event", _TEXT, "The kind."), *_TAGS),
        example={"event": "part_start", "idx": 0, "part_kind": "text", "content": "Under", **_TAGGED},
    ),
    EventKind("run-begin", "event", SUB_AGENT, "A sub-agent begins.", _TAGS, {"event": "run-begin"}, _TAGGED),
    EventKind(
        "run-end",
        "event",
        SUB_AGENT,
        "A sub-agent has ended. The `end` of the session's run ends all its sub-agents: no `run-end` follows it.",
        (
            EventField("outcome", _TEXT, "`completed`, `cancelled` or `failed`."),
            EventField("reason", _TEXT + _OR_NULL, "Why it was cancelled."),
            EventField("msg", _TEXT, "A sentence for people.", required=False),
            EventField("code", _TEXT, "A row of the error catalogue.", required=False),
            EventField("error_type", _TEXT, "The class of the exception.", required=False),
            *_TAGS,
        ),
        {"event": "run-end"},
        {"outcome": "completed", "reason": None, **_TAGGED},
    ),
    EventKind("info", "info", "", "A tool, or your own code, has called `add_info()`.", example={"looking": "attic"}),
    EventKind(
        "error of a tool",
        "error",
        "",
        "A tool, or your own code, has called `add_error()`; it does not end the run.",
        example={"msg": "The archive is closed."},
    ),
    EventKind(
        "deferred",
        "info",
        DEFERRED,
        "The agent leaves calls to others: to an approval, or to be made elsewhere.",
        (
            EventField("approvals", _OBJECT, "Tool names by call id, to be approved."),
            EventField("calls", _OBJECT, "Tool names by call id, to be made elsewhere."),
        ),
        example={"approvals": {"call_1": "delete"}, "calls": {}},
    ),
    EventKind(
        "resume",
        "resume",
        RUNTIME,
        "Another process goes on with the run.",
        (
            EventField("run_id", _TEXT, "The run."),
            EventField("attempt", _COUNT, "The process's number: the first one that goes on has 2."),
            EventField("traceparent", _TEXT, "The attempt's place in the run's trace."),
            EventField("void", _OBJECT + _OR_NULL, "`{idx, from_seq}`: what does not count (below)."),
            EventField("void_runs", "array", "The sub-agents that do not count, by `run`.", required=False),
        ),
        example={"run_id": "5d2c", "attempt": 2, "traceparent": "00-…-01", "void": {"idx": 1, "from_seq": 9}},
    ),
    EventKind(
        "gap",
        "info",
        RUNTIME,
        "Events before this one are no longer retained. It is not on the stream: a listener gets it.",
        (
            EventField("gap", _FLAG, "True."),
            EventField("superseded_by", _TEXT, "Another run has begun, and the listener ends.", required=False),
        ),
        example={"gap": True},
    ),
    EventKind(
        "error",
        "error",
        RUNTIME,
        "Before the `end` of a run that has no answer.",
        (
            EventField("msg", _TEXT, "A sentence for people."),
            EventField("code", _TEXT, "A row of the error catalogue.", required=False),
            EventField("error_type", _TEXT, "The class of the exception; none where it was cancelled.", required=False),
        ),
        example={
            "msg": "The run reached its usage limit.",
            "code": "limit_reached",
            "error_type": "UsageLimitExceeded",
        },
    ),
    EventKind(
        "end",
        "end",
        RUNTIME,
        "Last. A session that `stop()` closes has an empty body.",
        (
            EventField("run_id", _TEXT, "The run.", required=False),
            EventField("outcome", _TEXT, "`completed`, `cancelled`, `failed` or `lost`.", required=False),
            EventField("reason", _TEXT + _OR_NULL, "Why it was cancelled: `cancel`, `shutdown`, …", required=False),
            EventField("deleted", _FLAG, "The session was deleted: nothing of it is left.", required=False),
        ),
        example={"run_id": "5d2c", "outcome": "completed", "reason": None},
    ),
)


def event_schema() -> dict[str, Any]:
    """Return the JSON Schema of an event: one of the catalogue, or one of a later version."""
    later = {"title": "of a later version", "type": "object", "required": ["id", "type", "origin", "body"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An event of a session",
        "anyOf": [*(kind.to_schema() for kind in EVENTS), later],
    }
