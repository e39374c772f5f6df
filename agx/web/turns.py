"""What a chat page asks of a stored conversation: an answer, the last one again, or to go on with decided calls.

The message of a front end is untrusted input in the format of its protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import (
    BaseToolReturnPart,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ToolCallPart,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
    sanitize_messages,
)
from pydantic_ai.tools import DeferredToolResults

from ..error_codes import REQUEST_UNREADABLE
from ..errors import ConversationChangedError
from ..sessions.base import EXTERNAL_CALLS, Session, without_conversation_ids
from ..sessions.lost_answer import append_answer
from .route import RefusedError, describe_fields

Prompt = str | Sequence[UserContent]
Messages = list[ModelMessage]

_PASSED_OVER = "The user did not decide on this call, but went on with another message."
_CUT_OFF = "The run ended before this call had a result."


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn: its prompt, or None where it goes on from what `prepare` makes of the stored messages.

    `prepare` raises ConversationChangedError where the page has shown another conversation than the stored one.
    """

    prompt: Prompt | None
    prepare: Callable[[Messages], Messages]
    results: DeferredToolResults | None = None


@dataclass(kw_only=True)
class TurnSession(Session):
    """A stored conversation as a turn goes on with it; prepared while the run has the session for itself.

    Args:
        lost_answer: messages of the run before, whose process died.
        branch: stores the conversation as it was before the turn, if the turn drops its last answer.
    """

    stored: Session
    turn: Turn
    lost_answer: Messages = field(default_factory=list)
    branch: Session | None = None

    async def load(self) -> None:
        """Take the stored messages, prepared; raises ConversationChangedError, and what the stored sessions raise."""
        await self.stored.load()
        before = append_answer(self.stored.msgs, self.lost_answer)
        self.msgs = self.turn.prepare(before)
        if self.branch is not None and len(before) > len(self.msgs):
            self.branch.msgs = without_conversation_ids(before)
            await self.branch.save()

    async def begin(self, request: ModelRequest) -> None:
        """Store the prompt as the stored session does; raises what it raises."""
        self.stored.msgs = self.msgs
        await self.stored.begin(request)

    async def save(self) -> None:
        """Write the messages as the stored session does; raises what it raises."""
        self.stored.msgs = self.msgs
        await self.stored.save()


def ask(prompt: Prompt) -> Turn:
    """Return the turn that answers a prompt; calls that await a decision are denied by it."""

    def prepare(messages: Messages) -> Messages:
        return [*messages, *_answer(pending_calls(messages).values(), "denied", _PASSED_OVER)]

    return Turn(prompt, prepare)


def ask_again(prompt: Prompt) -> Turn:
    """Return the turn that drops the last answer, which must be one to this prompt, and asks for another."""

    def prepare(messages: Messages) -> Messages:
        kept = messages[: end_of_prompt(messages)]
        asked = [part for part in kept[-1].parts if isinstance(part, UserPromptPart)] if kept else []
        if "\n".join(text_of(part.content) for part in asked) != text_of(prompt):
            raise ConversationChangedError("its last prompt is another one")
        return kept

    return Turn(None, prepare)


def decide(results: DeferredToolResults, outputs: Mapping[str, object]) -> Turn:
    """Return the turn that goes on with the calls that await a decision or a result: all of them, and no others.

    Args:
        results: has the approvals. `prepare` adds the results of external calls.
        outputs: what the page has as outputs, by call. Only those of external calls are taken: a page can approve a
            call of a tool of the service, but not make up its result.
    """

    def prepare(messages: Messages) -> Messages:
        pending, external = pending_calls(messages).keys(), external_calls(messages)
        results.calls = {call_id: outputs[call_id] for call_id in external if call_id in outputs}
        if not pending or results.approvals.keys() != pending - external or results.calls.keys() != external:
            raise ConversationChangedError("the calls that await a decision are others")
        return messages

    return Turn(None, prepare, results)


def external_calls(messages: Sequence[ModelMessage]) -> set[str]:
    """Return the ids of the pending calls that are to be made elsewhere: they await a result, not an approval."""
    last = next((message for message in reversed(messages) if isinstance(message, ModelResponse)), None)
    marked = None if last is None else (last.metadata or {}).get(EXTERNAL_CALLS)
    return {call_id for call_id in pending_calls(messages) if isinstance(marked, list) and call_id in marked}


def pending_calls(messages: Sequence[ModelMessage]) -> dict[str, ToolCallPart]:
    """Return the calls at the end of a conversation that await a decision, by their ids."""
    returned: set[str] = set()
    for message in reversed(messages):
        if message.state == "interrupted":
            break
        if isinstance(message, ModelResponse):
            return {call.tool_call_id: call for call in message.tool_calls if call.tool_call_id not in returned}
        if any(isinstance(part, UserPromptPart) for part in message.parts):
            break
        returned |= _returned([message])
    return {}


def close_calls(messages: Sequence[ModelMessage]) -> Messages:
    """Return a conversation in which each call that will never have a result gets one that states this."""
    waiting = {*_returned(messages), *pending_calls(messages)}
    closed: Messages = []
    for message in messages:
        closed.append(message)
        if isinstance(message, ModelResponse):
            dangling = [call for call in message.tool_calls if call.tool_call_id not in waiting]
            closed += _answer(dangling, "interrupted", _CUT_OFF)
    return closed


def end_of_prompt(messages: Sequence[ModelMessage]) -> int:
    """Return how many messages there are up to the last prompt, which is counted."""
    for index in range(len(messages), 0, -1):
        if any(isinstance(part, UserPromptPart) for part in messages[index - 1].parts):
            return index
    return 0


def text_of(prompt: Prompt) -> str:
    """Return the text of a prompt, without what else is in it."""
    return prompt if isinstance(prompt, str) else "\n".join(part for part in prompt if isinstance(part, str))


def _returned(messages: Iterable[ModelMessage]) -> set[str]:
    return {part.tool_call_id for message in messages for part in message.parts if isinstance(part, BaseToolReturnPart)}


def _answer(calls: Iterable[ToolCallPart], outcome: Literal["denied", "interrupted"], why: str) -> list[ModelMessage]:
    parts = [ToolReturnPart(call.tool_name, why, call.tool_call_id, outcome=outcome) for call in calls]
    return [ModelRequest(parts=parts)] if parts else []


@contextmanager
def refusing_unreadable(what: str = "The last message") -> Iterator[None]:
    """Turn what a protocol's adapter, or `prompt_of()`, finds wrong with a part of a request into 400."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, UserError, UserWarning) as error:
        # It warns of what it drops: where warnings are errors, such a message is refused.
        detail = f"{what} can't be read: {_describe(error)}"
        raise RefusedError(REQUEST_UNREADABLE, detail, status=400) from error


def prompt_of(loaded: Sequence[ModelMessage]) -> Prompt:
    """Return the content of the user's message.

    What a browser must not decide (system prompts, uploads by reference) is dropped.

    Raises:
        ValueError: nothing is left.
    """
    asked = [part for message in loaded for part in message.parts if isinstance(part, UserPromptPart)]
    content: list[UserContent] = []
    for message in sanitize_messages([ModelRequest(parts=asked)]):
        for part in message.parts:
            if isinstance(part, UserPromptPart):
                content += [part.content] if isinstance(part.content, str) else part.content
    if not any(content):
        raise ValueError("it has no content")
    return content[0] if len(content) == 1 and isinstance(content[0], str) else content


def _describe(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_fields(error.errors())
    return str(error)
