"""The messages steered into one run: from the session's inbox to the agent, and on to the stored conversation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_ai import RunContext
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from redis.exceptions import RedisError

from ...control.inbox import START, Inbox, SteeredText
from ...facts.schema import RunSteered, SteerOutcome, Trace
from ...redis.retry import reply_timeout
from ...stream.entry import PROMPT
from .run_events import RunEvents
from .run_facts import RunFacts

_INBOX_ID = "agx_inbox"  # in a message's metadata, which the model does not get


class SteeredMessages:
    """Takes the messages of an inbox into a run, each of them once.

    A message has its id in the inbox as metadata. So checkpoints and stored conversations show which messages they
    have, and the inbox keeps a message until its conversation is stored.
    """

    def __init__(self, events: RunEvents, facts: RunFacts, place: Trace) -> None:
        self.inbox: Inbox | None = None  # None where the run is observed, not streamed
        self._events = events
        self._facts = facts
        self._place = place
        self._ctx: RunContext[Any] | None = None
        self._read_to = START
        self._known: set[str] = set()  # ids of messages that were read, or that an earlier attempt enqueued
        self._stored: set[str] = set()  # ids of messages that the conversation had
        self._waiting: list[SteeredText] = []  # read before the agent began
        self._enqueued: dict[str, str] = {}  # texts by id, not yet in the agent's conversation
        self._taken: list[str] = []  # ids of messages that the conversation has

    def look(self) -> None:
        """Read the inbox soon: a message has come, or a hint may have been missed."""
        if self.inbox is not None:
            asyncio.ensure_future(self.inbox.read(self._read_to)).add_done_callback(self._on_read)

    def _on_read(self, reading: asyncio.Future[list[SteeredText]]) -> None:
        if not reading.cancelled() and reading.exception() is None:
            self._take(reading.result())

    def _take(self, found: Iterable[SteeredText]) -> None:
        for message in found:
            if message.id in self._known:
                continue
            self._known.add(message.id)
            self._read_to = message.id
            self._sort([message])
        self._enqueue_waiting()

    def _sort(self, found: Iterable[SteeredText]) -> None:
        for message in found:
            if message.id in self._stored:
                self._taken.append(message.id)  # a run before stored it, and died before it removed it
            else:
                self._waiting.append(message)

    def _enqueue_waiting(self) -> None:
        while self._ctx is not None and self._waiting:
            message = self._waiting[0]
            # A whole message: a part that is enqueued has no metadata.
            with contextlib.suppress(UserError):  # the agent has ended: the next run takes it
                self._ctx.enqueue(_to_request(message.id, message.text))
                self._enqueued[message.id] = message.text
            del self._waiting[0]

    def restore(self, conversation: Iterable[ModelMessage], pending: Iterable[ModelMessage]) -> None:
        """Take what the conversation has of the inbox, and what an earlier attempt enqueued and did not deliver."""
        self._stored = {message_id for message_id, _ in _find(conversation)}
        self._enqueued |= dict(_find(pending))
        self._known.update(self._enqueued)
        found, self._waiting = self._waiting, []
        self._sort(message for message in found if message.id not in self._enqueued)

    def begin(self, ctx: RunContext[Any]) -> None:
        """The agent runs: it takes what waits, after what an earlier attempt has enqueued."""
        self._ctx = ctx
        self._enqueue_waiting()

    def deliver(self) -> None:
        """A model request has been prepared, or the agent has ended: emit which messages are in the conversation."""
        if self._enqueued and self._ctx is not None:
            left = {
                message_id for pending in self._ctx.pending_messages or () for message_id, _ in _find(pending.messages)
            }
            self._settle([message_id for message_id in self._enqueued if message_id not in left], "delivered")

    async def close(self, run_id: str) -> None:
        """The agent has its answer: take the messages that have come meanwhile, or refuse further ones."""
        if self.inbox is None:
            return
        with contextlib.suppress(RedisError, OSError, TimeoutError):  # then the next run takes them
            async with reply_timeout():
                # With a message enqueued pydantic-ai asks the model again: once for all that have come by now.
                if self._enqueued or not await self.inbox.close(run_id, self._read_to):
                    self._take(await self.inbox.read(self._read_to))

    def leave(self) -> list[ModelRequest]:
        """The run ends: return what no model request had, for the end of the stored conversation."""
        self.deliver()
        self._enqueued |= {message.id: message.text for message in self._waiting}
        self._waiting.clear()
        left = [_to_request(message_id, text) for message_id, text in self._enqueued.items()]
        self._settle(list(self._enqueued), "stored")
        return left

    def _settle(self, ids: Iterable[str], outcome: SteerOutcome) -> None:
        for message_id in ids:
            text = self._enqueued.pop(message_id)
            self._taken.append(message_id)
            self._events.put("info", PROMPT, {"steer": True, "prompt": text, "id": message_id}, when="now")
            header = self._facts.describe(f"steer.{message_id}", self._place)
            self._facts.emit(RunSteered(**header, outcome=outcome, at_ns=time.time_ns()))

    async def remove(self) -> None:
        """The conversation is stored: remove from the inbox what it has."""
        if self.inbox is not None and self._taken:
            with contextlib.suppress(RedisError, OSError):  # the next run finds them in its conversation
                await self.inbox.remove(self._taken)


def _to_request(message_id: str, text: str) -> ModelRequest:
    return ModelRequest(parts=[UserPromptPart(text)], metadata={_INBOX_ID: message_id})


def _find(messages: Iterable[ModelMessage]) -> Sequence[tuple[str, str]]:
    """Return id and text of the messages that came from an inbox."""
    return [
        (str(message.metadata[_INBOX_ID]), str(getattr(message.parts[0], "content", "")))
        for message in messages
        if isinstance(message, ModelRequest) and message.metadata and _INBOX_ID in message.metadata
    ]
