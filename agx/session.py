"""`Session`: the conversation that a run loads and saves, and one that lives in Redis."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelRequest, UserPromptPart
from pydantic_core import PydanticSerializationError
from redis.exceptions import RedisError

from . import keys
from .engine import current_engine
from .errors import RedisUnavailableError


@dataclass(kw_only=True)
class Session(ABC):
    """Base of a stored conversation (seed's API): `run()` calls `load()`, extends `msgs` and calls `save()`."""

    msgs: list[ModelMessage] = field(default_factory=list)

    @abstractmethod
    async def load(self) -> None:
        """Fill `msgs` from the storage."""

    @abstractmethod
    async def save(self) -> None:
        """Write `msgs` to the storage; called on every outcome."""

    def msgs_to_json(self) -> bytes:
        """Return the messages as JSON. What a tool returned that JSON can't hold is replaced, not the rest lost."""
        try:
            return ModelMessagesTypeAdapter.dump_json(self.msgs)
        except PydanticSerializationError:
            plain = ModelMessagesTypeAdapter.dump_python(
                self.msgs, mode="json", fallback=lambda value: {"unserialisable": type(value).__name__}
            )
            # Of a lone surrogate a question mark is left.
            return json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")

    def msgs_from_json(self, data: bytes | str) -> None:
        """Take the messages from JSON; raises pydantic's ValidationError."""
        self.msgs = ModelMessagesTypeAdapter.validate_json(data)

    def get_user_prompt(self) -> str:
        """Return the text of the first user prompt, "No title" where there is none."""
        for message in self.msgs:
            if isinstance(message, ModelRequest):
                for part in message.parts:
                    if isinstance(part, UserPromptPart):
                        texts = [part.content] if isinstance(part.content, str) else part.content
                        return " ".join(text for text in texts if isinstance(text, str)) or "No title"
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


@dataclass
class RedisSession(Session):
    """A conversation kept in Redis, beside the runtime's keys.

    Args:
        ttl: seconds it is kept after it was last saved.
    """

    scope_id: keys.Id
    user_id: keys.Id
    session_id: keys.Id
    ttl: int = 30 * 86_400

    @property
    def _key(self) -> tuple[Any, str]:
        engine = current_engine()
        session = keys.SessionKeys.of(engine.config.key_prefix, self.scope_id, self.user_id, self.session_id)
        return engine, session.messages

    async def load(self) -> None:
        engine, key = self._key
        try:
            data = await engine.control.execute("GET", key)
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("load the session", error) from error
        if data is not None:
            self.msgs_from_json(data)

    async def save(self) -> None:
        engine, key = self._key
        try:
            await engine.control.execute("SET", key, self.msgs_to_json(), "EX", self.ttl)
        except (RedisError, OSError) as error:
            raise RedisUnavailableError("save the session", error) from error
