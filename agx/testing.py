"""For users' own tests: a real server, a session kept in memory, and a run's events gathered (contract, section 3).

It also has a model that needs no key and answers at the pace of a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelRequest, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

from .embedded.server import EmbeddedServer
from .listeners.listener import listen
from .redis.keys import Id
from .sessions.base import Session

__all__ = ["MemorySession", "PacedModel", "collect", "embedded_redis"]

_SHORT = "This is a model without a key. Ask for something long, or name a tool."
_LONG = " ".join(f"This is sentence {n} of a long answer." for n in range(1, 61))


@contextmanager
def embedded_redis() -> Iterator[str]:
    """Give the URL of a Valkey or Redis of the test's own, which keeps nothing and ends with the `with` block.

    Raises:
        AgxError: there is no server's binary; the message names where to get one.
    """
    with EmbeddedServer() as server:
        yield server.url


@dataclass
class MemorySession(Session):
    """A session whose conversation is kept in a dict.

    Args:
        id: its place in `store`.
        store: where it is kept; give the same one to the next turn's session.
    """

    id: str
    store: dict[str, bytes] = field(default_factory=dict)

    async def load(self) -> None:
        if data := self.store.get(self.id):
            self.msgs_from_json(data)

    async def save(self) -> None:
        self.store[self.id] = self.msgs_to_json()


class PacedModel(FunctionModel):
    """A model that needs no key and answers at the pace of a real one.

    A prompt with the word "long" gets an answer of half a minute. A prompt with a word of a tool's name, such as "roll"
    for `roll_dice`, calls the tool, if it needs no arguments. It answers only requests that are streamed, as those of a
    run with listeners are.

    Args:
        pause: seconds before each word.
    """

    def __init__(self, pause: float = 0.07) -> None:
        super().__init__(stream_function=self._stream, model_name="paced")
        self._pause = pause

    async def _stream(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
        asked = [part for message in messages if isinstance(message, ModelRequest) for part in message.parts]
        results = [part for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
        prompt = str(next(part.content for part in reversed(asked) if isinstance(part, UserPromptPart))).lower()
        named = [tool for tool in info.function_tools if {*tool.name.split("_")} & {*prompt.split()}]
        calls = [] if results else [tool.name for tool in named if not tool.parameters_json_schema.get("required")]
        for index, name in enumerate(calls):
            yield {index: DeltaToolCall(name=name, json_args="{}", tool_call_id=f"call_{len(messages)}_{index}")}
        reported = " ".join(f"{result.tool_name} returned {result.model_response_str()}." for result in results)
        for word in [] if calls else (reported or (_LONG if "long" in prompt else _SHORT)).split():
            await asyncio.sleep(self._pause)
            yield f"{word} "


async def collect(
    scope_id: Id, user_id: Id, session_id: Id, *, after: str | None = None, timeout: float = 30
) -> list[dict[str, Any]]:
    """Return a run's events, as `listen(serialize=False)` gives them, up to and including its `end`.

    Args:
        after: id of the last event seen; goes on after it.
        timeout: seconds without an event after which it gives up.

    Raises:
        TimeoutError: the run did not end in time.
    """
    events = [
        event async for event in listen(scope_id, user_id, session_id, after=after, timeout=timeout, serialize=False)
    ]
    if not events or events[-1]["type"] != "end":
        raise TimeoutError(f"session {session_id!r} was silent for {timeout} s before its end")
    return events
