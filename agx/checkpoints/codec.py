"""Checkpoints: what a run needs to go on in another process, as the field `ck` of its own stream entries.

A checkpoint holds only what changed since the one before it. Source: contract, sections 2 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelRequest, ToolReturnPart, UserContent
from pydantic_ai.tools import DeferredToolResults
from pydantic_ai.usage import RunUsage
from pydantic_core import from_json, to_json

_REFERENCE = "ref"
FORMAT = 1  # goes up when an older process could misread a newer checkpoint

_CONTENT: TypeAdapter[str | list[UserContent]] = TypeAdapter(str | list[UserContent])
_USAGE: TypeAdapter[RunUsage] = TypeAdapter(RunUsage)
_RESULTS: TypeAdapter[DeferredToolResults] = TypeAdapter(DeferredToolResults)


class UnreadableCheckpointError(ValueError):
    """A checkpoint that this version should be able to read, and cannot: the run is lost."""


class NewerCheckpointError(ValueError):
    """A checkpoint of a newer version: leave the run to a newer process."""


@dataclass(frozen=True, slots=True)
class ToolReturn:
    """A tool call's result, as the model will see it."""

    part: ToolReturnPart
    content: str | list[UserContent] | None = None  # user content that follows the tool results


@dataclass(frozen=True, slots=True)
class Pending:
    """Messages that one `enqueue()` left for the next model request, or for the run's end.

    Args:
        tool_call_id: the tool call beside whose result they go; None where they follow all results.
    """

    messages: tuple[ModelMessage, ...]
    priority: Literal["asap", "when_idle"] = "asap"
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What changed in a run since its checkpoint before.

    Args:
        stored: fingerprint of the conversation that the session held; in a run's first checkpoint only.
        start: index, in the whole conversation, of the first message in `messages`. It is below the number of
            messages known before where the history was rewritten.
        messages: all messages of the conversation from `start` on; None where nothing changed.
        returned: the tool call that returned.
        usage: the run's usage so far.
        output_retries: how many output retries the run has used.
        pending: messages that were enqueued and are not delivered yet.
        chars: length of the whole conversation; the tokens of an interrupted request are estimated from it.
    """

    stored: str | None = None
    start: int = 0
    messages: tuple[ModelMessage, ...] | None = None
    returned: ToolReturn | None = None
    usage: RunUsage | None = None
    output_retries: int | None = None
    pending: tuple[Pending, ...] = ()
    chars: int | None = None


_PENDING: TypeAdapter[list[Pending]] = TypeAdapter(list[Pending])


def encode(checkpoint: Checkpoint, by_reference: frozenset[str] = frozenset()) -> bytes:
    """Return a checkpoint as JSON. A value that JSON can't hold is replaced, as in a stored conversation.

    Args:
        by_reference: ids of tool calls whose results an earlier checkpoint holds: they are not written again.
    """
    fields: dict[str, Any] = {"v": FORMAT}
    if checkpoint.stored is not None:
        fields["stored"] = checkpoint.stored
    if checkpoint.messages is not None:
        fields |= {"start": checkpoint.start, "messages": _refer(dump_messages(checkpoint.messages), by_reference)}
    if checkpoint.returned is not None:
        # Inside a message, because only ModelMessagesTypeAdapter writes bytes as base64.
        (message,) = dump_messages((ModelRequest([checkpoint.returned.part]),))
        (fields["returned"],) = message["parts"]
        if checkpoint.returned.content is not None:
            fields["content"] = _dump(_CONTENT, checkpoint.returned.content)
    if checkpoint.usage is not None:
        fields["usage"] = _dump(_USAGE, checkpoint.usage)
    if checkpoint.output_retries is not None:
        fields["output_retries"] = checkpoint.output_retries
    if checkpoint.chars is not None:
        fields["chars"] = checkpoint.chars
    if checkpoint.pending:
        fields["pending"] = [
            {"messages": dump_messages(one.messages), "priority": one.priority, "tool_call_id": one.tool_call_id}
            for one in checkpoint.pending
        ]
    return to_json(fields, inf_nan_mode="null")  # orjson refuses integers beyond 64 bits


def dump_results(results: DeferredToolResults) -> dict[str, Any]:
    """Return approvals and results of deferred calls as JSON values, for a job."""
    plain: dict[str, Any] = _dump(_RESULTS, results)
    return plain


def load_results(plain: dict[str, Any]) -> DeferredToolResults:
    """Return approvals and results of deferred calls.

    Raises:
        UnreadableCheckpointError: they can't be read.
    """
    try:
        return _RESULTS.validate_python(plain)
    except ValidationError as error:
        raise UnreadableCheckpointError(f"results of deferred calls can't be read ({type(error).__name__})") from None


def is_newer(data: bytes) -> bool:
    """Return whether a checkpoint was written by a newer version; False where that can't be read."""
    try:
        return int(orjson.loads(data)["v"]) > FORMAT
    except (KeyError, TypeError, ValueError):
        return False


def decode(data: bytes, returned_before: Mapping[str, ToolReturn]) -> Checkpoint:
    """Parse a checkpoint.

    Args:
        returned_before: the tool results of the checkpoints before, by call id; messages refer to them.

    Raises:
        NewerCheckpointError: its format is newer than this version.
        UnreadableCheckpointError: it is not a checkpoint.
    """
    try:
        fields = from_json(data)
        version = int(fields["v"])
        if version > FORMAT:
            raise NewerCheckpointError(f"format {version} is newer than {FORMAT}: update this process")
        messages = _resolve(fields.get("messages"), returned_before)
        returned = fields.get("returned")
        content = fields.get("content")
        return Checkpoint(
            stored=None if (stored := fields.get("stored")) is None else str(stored),
            start=int(fields.get("start", 0)),
            messages=None if messages is None else tuple(ModelMessagesTypeAdapter.validate_python(messages)),
            returned=None
            if returned is None
            else ToolReturn(_load_return(returned), None if content is None else _CONTENT.validate_python(content)),
            usage=None if (usage := fields.get("usage")) is None else _USAGE.validate_python(usage),
            output_retries=None if (retries := fields.get("output_retries")) is None else int(retries),
            pending=tuple(_PENDING.validate_python(fields.get("pending", []))),
            chars=None if (chars := fields.get("chars")) is None else int(chars),
        )
    except NewerCheckpointError:
        raise
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        # The exception's text may quote the conversation.
        raise UnreadableCheckpointError(f"a checkpoint can't be read ({type(error).__name__})") from None


def dump_messages(messages: tuple[ModelMessage, ...]) -> list[Any]:
    """Return messages as JSON values."""
    plain: list[Any] = _dump(ModelMessagesTypeAdapter, list(messages))
    return plain


def _load_return(plain: Any) -> ToolReturnPart:
    (message,) = ModelMessagesTypeAdapter.validate_python([{"kind": "request", "parts": [plain]}])
    (part,) = message.parts
    if not isinstance(part, ToolReturnPart):
        raise TypeError
    return part


def _refer(messages: list[Any], by_reference: frozenset[str]) -> list[Any]:
    for message in messages:
        message["parts"] = [
            {_REFERENCE: part["tool_call_id"]}
            if part.get("part_kind") == "tool-return" and part["tool_call_id"] in by_reference
            else part
            for part in message["parts"]
        ]
    return messages


def _resolve(messages: list[Any] | None, returned: Mapping[str, ToolReturn]) -> list[Any] | None:
    for message in messages or ():
        message["parts"] = [
            returned[part[_REFERENCE]].part if _REFERENCE in part else part for part in message["parts"]
        ]
    return messages


def _dump(adapter: TypeAdapter[Any], value: Any) -> Any:
    plain = adapter.dump_python(value, mode="json", fallback=lambda odd: {"unserialisable": type(odd).__name__})
    return _without_surrogates(plain)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return value
