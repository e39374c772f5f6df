"""`Session`: the conversation that a run loads and saves, and what a store of them can do."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    UserPromptPart,
)
from pydantic_core import PydanticSerializationError

from ..errors import BranchError, SessionUnknownError, TextError
from ..redis.keys import Id, check_id
from ..stream.events import to_readable

_UNREADABLE_NUMBER = re.compile(rb"[0-9]{4301}")  # no JSON parser of Python's reads more digits
EXTERNAL_CALLS = "agx_external_calls"  # in the metadata of a response; not sent to the model
TITLE_LENGTH = 200  # characters


@dataclass(kw_only=True)
class Session(ABC):
    """Base of a stored conversation: `run()` calls `load()`, `begin()`, and at the end, with new `msgs`, `save()`.

    Args:
        msgs: the conversation, as pydantic-ai's messages.
    """

    msgs: list[ModelMessage] = field(default_factory=list)

    @abstractmethod
    async def load(self) -> None:
        """Fill `msgs` from the storage."""

    async def begin(self, request: ModelRequest) -> None:  # noqa: B027 - a store need not keep the prompt
        """Store the prompt before the agent starts, so that it survives the process (contract, section 3).

        By default it does nothing: override it where a prompt must not be lost. `msgs` does not have the request yet;
        `save()` gets the whole conversation, the prompt included. A run without a prompt does not call it.

        Args:
            request: has the prompt as its only part.
        """

    @abstractmethod
    async def save(self) -> None:
        """Write `msgs` to the storage; called on every outcome."""

    def msgs_to_json(self) -> bytes:
        """Return the messages as JSON. What a tool returned that JSON can't hold is replaced, not the rest lost."""
        try:
            data = ModelMessagesTypeAdapter.dump_json(self.msgs)
        except PydanticSerializationError:
            data = None
        if data is None or _UNREADABLE_NUMBER.search(data):
            plain = ModelMessagesTypeAdapter.dump_python(
                self.msgs, mode="json", fallback=lambda value: {"unserialisable": type(value).__name__}
            )
            return json.dumps(to_readable(plain), ensure_ascii=False).encode()
        return data

    def msgs_from_json(self, data: bytes | str) -> None:
        """Take the messages from JSON.

        Raises:
            pydantic.ValidationError: it is not what `msgs_to_json()` gives.
        """
        self.msgs = ModelMessagesTypeAdapter.validate_json(data)

    def get_user_prompt(self) -> str:
        """Return the text of the first user prompt, "No title" where there is none."""
        for message in self.msgs:
            for part in message.parts:
                if isinstance(part, UserPromptPart):
                    return _text_of(part) or "No title"
        return "No title"

    @staticmethod
    def nodes_from_msgs(msgs: Sequence[ModelMessage] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation as nodes: each response with the parts of the requests it answers before its own.

        Requests without a response (a run that was cut off) make a node of their own; system prompts and signatures
        are left out. Messages come as pydantic-ai's or as the dicts of their JSON.
        """
        plain = ModelMessagesTypeAdapter.dump_python(
            [message for message in msgs if not isinstance(message, dict)], mode="json"
        ) or [message for message in msgs if isinstance(message, dict)]
        nodes: list[dict[str, Any]] = []
        asked: list[dict[str, Any]] = []
        for message in plain:
            parts = [
                {**part, "signature": None}
                for part in message.get("parts", [])
                if part.get("part_kind") != "system-prompt"
            ]
            if message.get("kind") == "response":
                nodes.append({**message, "kind": None, "parts": asked + parts})
                asked = []
            elif message.get("kind") == "request":
                asked += parts
        if asked:
            nodes.append({"kind": None, "parts": asked})
        return nodes


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A conversation in a listing.

    Args:
        session_id: which one.
        title: the one that `rename()` gave, or the first prompt; at most 200 characters.
        saved_at: when it was last saved; UTC.
        parent: the session that it branches from; None for any other, and once that one is deleted.
    """

    session_id: str
    title: str
    saved_at: datetime
    parent: str | None = None


class SessionStore(Protocol):
    """A store of conversations. `RedisSessions` and `SqlSessions` are ready to use.

    Each method raises TypeError for an id that is neither an int nor a str, and ValueError for one with a character
    that none may have.
    """

    def open(self, scope_id: Id, user_id: Id, session_id: Id, *, parent: Id | None = None) -> Session:
        """Return a session, not yet loaded, for one `run()`.

        Args:
            parent: what a new conversation branches from.
        """
        ...

    async def list(
        self,
        scope_id: Id,
        user_id: Id,
        *,
        limit: int = 50,
        offset: int = 0,
        search: str | None = None,
        parent: Id | None = None,
    ) -> Sequence[StoredSession]:
        """Return a user's conversations, the last saved first: at most `limit`, without the first `offset`.

        Args:
            search: only those with this text, in upper or lower case: in the title, and where the store can search
                it, in the prompts and answers.
            parent: only those that branch from this one.
        """
        ...

    async def rename(self, scope_id: Id, user_id: Id, session_id: Id, title: str) -> None:
        """Give a conversation a title, which later turns do not change.

        Args:
            title: 1 to 200 characters.

        Raises:
            TextError: such a title can't be stored.
            SessionUnknownError: the user has no such conversation.
        """
        ...

    async def delete(self, scope_id: Id, user_id: Id, session_id: Id) -> bool:
        """Remove a stored conversation; returns whether it was there. Its branches stay, without a `parent`.

        `agx.delete_session()` calls it, and removes all other data of the session from Redis.
        """
        ...


async def branch_session(
    scope_id: Id,
    user_id: Id,
    session_id: Id,
    *,
    messages: int,
    sessions: SessionStore,
    branch_id: Id | None = None,
) -> str:
    """Store the first messages of a conversation as a new, independent one; returns its session id.

    Args:
        messages: how many of the stored messages it has.
        branch_id: the new session; by default a random one.

    Raises:
        SessionUnknownError: the user has no such conversation.
        BranchError: it has fewer messages, or the last one of them has tool calls, whose results are in the next one.
        SessionConflictError: the session `branch_id` already has a conversation.
        TypeError, ValueError: an id can't be used.
        Exception: what the store raised.
    """
    name = uuid.uuid4().hex if branch_id is None else check_id(branch_id, "branch_id")
    source = sessions.open(scope_id, user_id, session_id)
    branch = sessions.open(scope_id, user_id, name, parent=session_id)
    await source.load()
    if not source.msgs:
        raise SessionUnknownError(str(session_id))
    if not 0 < messages <= len(source.msgs):
        raise BranchError(f"the conversation has 1 to {len(source.msgs)} messages, not {messages}")
    branch.msgs = without_conversation_ids(source.msgs[:messages])
    last = branch.msgs[-1]
    if isinstance(last, ModelResponse) and last.tool_calls:
        raise BranchError("the last message has tool calls without results: keep one message more, or one less")
    await branch.save()
    return name


def without_conversation_ids(messages: Iterable[ModelMessage]) -> list[ModelMessage]:
    """Return messages for a branch, without `conversation_id`: pydantic-ai's field names the session they come from."""
    return [replace(message, conversation_id=None) for message in messages]


def keep_prompt(messages: Sequence[ModelMessage], request: ModelRequest) -> list[ModelMessage]:
    """Return a run's messages with its prompt in them, also where a history processor has dropped it.

    One that it has edited stays edited: such a copy has the prompt's timestamp.

    Args:
        messages: what upstream's `all_messages()` gives.
        request: the run's first one, with `run_id`.
    """
    prompt = [part for part in request.parts if isinstance(part, UserPromptPart)]
    kept = {part.timestamp for message in messages for part in message.parts if isinstance(part, UserPromptPart)}
    if not prompt or any(part.timestamp in kept for part in prompt):
        return list(messages)
    first = next((n for n, one in enumerate(messages) if one.run_id == request.run_id), len(messages))
    return [*messages[:first], replace(request, parts=prompt), *messages[first:]]


def mark_external(messages: Sequence[ModelMessage], calls: Iterable[ToolCallPart]) -> list[ModelMessage]:
    """Return a run's messages with the ids of those calls in them that are to be made elsewhere.

    pydantic-ai's messages do not show whether an open call awaits a result or an approval.
    """
    marked, ids = list(messages), sorted(call.tool_call_id for call in calls)
    last = next((n for n in reversed(range(len(marked))) if isinstance(marked[n], ModelResponse)), None)
    if ids and last is not None:
        marked[last] = replace(marked[last], metadata={**(marked[last].metadata or {}), EXTERNAL_CALLS: ids})
    return marked


def title_of(session: Session) -> str:
    """Return the title of a conversation that was not renamed."""
    return to_storable(session.get_user_prompt())[:TITLE_LENGTH]


def check_title(title: str) -> str:
    """Return a title as it is stored, without the spaces around it; raises TextError where it is empty or too long."""
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, not {type(title).__name__}")
    title = to_storable(title).strip()
    if not 0 < len(title) <= TITLE_LENGTH:
        raise TextError(f"a title must have 1 to {TITLE_LENGTH} characters, not only spaces")
    return title


def searchable_text(messages: Iterable[ModelMessage]) -> str:
    """Return the prompts and answers of a conversation, in the form that a search compares."""
    parts = (part for message in messages for part in message.parts if isinstance(part, UserPromptPart | TextPart))
    return fold_case("\n".join(_text_of(part) for part in parts))


def fold_case(text: str) -> str:
    """Return a text without differences of case."""
    return to_storable(text.casefold())


def _text_of(part: UserPromptPart | TextPart) -> str:
    content = [part.content] if isinstance(part.content, str) else part.content
    return " ".join(text for text in content if isinstance(text, str))


def to_storable(text: str) -> str:
    """Return a text without what PostgreSQL's text, or UTF-8, can't hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
