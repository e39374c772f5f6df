"""Folds a run's checkpoints into how far it got: its conversation, its tool results, its usage. Pure, no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import orjson
from pydantic_ai.messages import BaseToolReturnPart, ModelMessage, ModelResponse, ToolCallPart
from pydantic_ai.usage import RunUsage

from .codec import Pending, ToolReturn, UnreadableCheckpointError, decode, dump_messages


@dataclass(slots=True)
class Progress:
    """How far a run got.

    Args:
        stored: how many messages of the conversation the session holds; the run's own follow.
        messages: the whole conversation.
        returns: results of the last response's tool calls, by call id.
        usage: usage of all attempts; None where none was recorded.
        output_retries: output retries used so far.
        pending: messages that were enqueued and are not delivered yet.
        resumed: whether an earlier attempt ran the agent, or may have.
    """

    stored: int
    messages: list[ModelMessage]
    returns: dict[str, ToolReturn] = field(default_factory=dict)
    usage: RunUsage | None = None
    output_retries: int = 0
    pending: tuple[Pending, ...] = ()
    resumed: bool = False

    @property
    def begun(self) -> bool:
        """Whether the run has a message of its own; without one it starts with its prompt."""
        return len(self.messages) > self.stored

    @property
    def ends_with_answer(self) -> bool:
        """Whether the last response calls no tool: the agent must not ask the model again."""
        last = self.messages[-1] if self.begun else None
        return isinstance(last, ModelResponse) and not last.tool_calls

    @property
    def open_calls(self) -> list[ToolCallPart]:
        """The last response's tool calls without a recorded result: they may have been under way.

        A run that has no message of its own may have gone on with calls of the stored conversation, once approved.
        """
        if not self.resumed:
            return []
        done = set(self.returns)
        for message in reversed(self.messages):
            if isinstance(message, ModelResponse):
                return [call for call in message.tool_calls if call.tool_call_id not in done]
            if self.begun:
                break
            done |= {part.tool_call_id for part in message.parts if isinstance(part, BaseToolReturnPart)}
        return []

    def drop_behind(self, expected: str) -> None:
        """Drop the messages after those with this fingerprint, with which the run began.

        Raises:
            UnreadableCheckpointError: the session no longer holds them.
        """
        count, _, _ = expected.partition(":")
        if count.isdecimal():
            del self.messages[int(count) :]
        self.stored = len(self.messages)
        if fingerprint(self.messages) != expected:
            raise UnreadableCheckpointError("the session no longer holds the conversation that the run began with")


def fold(checkpoints: Iterable[bytes], loaded: Sequence[ModelMessage], goes_on_from: str | None = None) -> Progress:
    """Return how far a run got.

    Args:
        checkpoints: of all attempts, in the order of the stream.
        loaded: the conversation as the session holds it now: that before the run, perhaps with the run's prompt.
        goes_on_from: fingerprint of the messages among these that the run goes on from; None: all of them.

    Raises:
        NewerCheckpointError: one was written by a newer version.
        UnreadableCheckpointError: one can't be read, or one before it is missing.
    """
    progress = Progress(len(loaded), list(loaded), resumed=True)
    if goes_on_from is not None:
        progress.drop_behind(goes_on_from)
    returned: dict[str, ToolReturn] = {}
    for data in checkpoints:
        checkpoint = decode(data, returned)
        if checkpoint.stored is not None:
            progress.drop_behind(checkpoint.stored)
        if checkpoint.messages is not None:
            if checkpoint.start > len(progress.messages):
                raise UnreadableCheckpointError("a checkpoint before this one is missing")
            progress.messages[checkpoint.start :] = checkpoint.messages
            progress.returns = {}
        if (result := checkpoint.returned) is not None:
            returned[result.part.tool_call_id] = progress.returns[result.part.tool_call_id] = result
        if checkpoint.usage is not None:
            progress.usage = checkpoint.usage
        if checkpoint.output_retries is not None:
            progress.output_retries = checkpoint.output_retries
        progress.pending = checkpoint.pending
    return progress


def fingerprint(messages: Sequence[ModelMessage]) -> str:
    """Return a fingerprint: it shows whether a session still holds the conversation that a run began with."""
    last = orjson.dumps(dump_messages(tuple(messages[-1:])))
    return f"{len(messages)}:{hashlib.blake2b(last, digest_size=8).hexdigest()}"
