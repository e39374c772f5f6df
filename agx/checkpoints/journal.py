"""The journal of one attempt: makes its checkpoints, and has the results that earlier attempts recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic_ai.messages import ModelMessage, ModelRequest, ToolCallPart, ToolReturnPart, UserContent
from pydantic_ai.usage import RunUsage

from .codec import Checkpoint, Pending, ToolReturn, encode
from .progress import Progress, fingerprint
from .text_size import count_instructions, count_message


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The present state of an agent's run."""

    messages: Sequence[ModelMessage]
    usage: RunUsage
    output_retries: int
    pending: Sequence[Pending]


class Journal:
    """The checkpoints of one attempt of a run.

    Args:
        progress: how far the attempts before got.
        take: returns the present state of the agent's run.
    """

    def __init__(self, progress: Progress, take: Callable[[], Snapshot]) -> None:
        self.hand_over = False  # raise at the next model request, so that another process goes on
        self._take = take
        self._replayed = progress.returns
        self._interrupted = {call.tool_call_id for call in progress.open_calls}
        self._stored: str | None = None if progress.begun else fingerprint(progress.messages[: progress.stored])
        self._recorded: list[ModelMessage | None] = list(progress.messages)
        self._chars = [count_message(message) for message in progress.messages]
        self._returned: dict[str, ToolReturnPart] = {}

    # --- what earlier attempts have recorded ---

    def recorded_return(self, call: ToolCallPart) -> ToolReturn | None:
        """Return the result of a tool call that an earlier attempt made: it is not made again."""
        return self._replayed.get(call.tool_call_id)

    def was_interrupted(self, call: ToolCallPart) -> bool:
        """Return whether an earlier attempt died while the call may have been under way."""
        return call.tool_call_id in self._interrupted

    # --- checkpoints ---

    def request(self, request: ModelRequest) -> bytes:
        """Return the checkpoint of a model request that is about to be sent; rides on `llm-begin`."""
        now = self._take()
        checkpoint = self._advance(now, [*now.messages, request])
        self._recorded[-1] = None  # pydantic-ai completes the request when it sends it
        return checkpoint

    def response(self) -> bytes:
        """Return the checkpoint of a model request that was answered; rides on `llm-end`."""
        now = self._take()
        return self._advance(now, now.messages)

    def returned(self, part: ToolReturnPart, content: str | Sequence[UserContent] | None) -> bytes:
        """Return the checkpoint of a tool call that returned; rides on `tool-return`."""
        self._returned[part.tool_call_id] = part
        following = content if content is None or isinstance(content, str) else list(content)
        now = self._take()
        # With the usage: the tool may have run an agent of its own.
        return encode(Checkpoint(returned=ToolReturn(part, following), usage=now.usage, pending=tuple(now.pending)))

    def _advance(self, now: Snapshot, messages: Sequence[ModelMessage]) -> bytes:
        # By identity: a message is never changed once it is in the history, a rewritten history has other objects.
        start = 0
        for known, message in zip(self._recorded, messages, strict=False):
            if known is not message:
                break
            start += 1
        self._recorded = list(messages)
        stored, self._stored = self._stored, None
        new = tuple(messages[start:])
        self._chars[start:] = map(count_message, new)
        by_reference = frozenset(
            part.tool_call_id
            for message in new
            for part in message.parts
            if isinstance(part, ToolReturnPart) and self._returned.get(part.tool_call_id) is part
        )
        return encode(
            Checkpoint(
                stored=stored,
                start=start,
                messages=new,
                usage=now.usage,
                output_retries=now.output_retries,
                pending=tuple(now.pending),
                chars=sum(self._chars) + count_instructions(messages),
            ),
            by_reference,
        )
