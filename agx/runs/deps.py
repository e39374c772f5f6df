"""`Deps`: a run's scope, user and session, and how tools add events to its stream (seed's API)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from ..listeners import manual as stream
from ..redis.keys import Id
from ..stream.entry import AGENT, RUNTIME, Body
from ..stream.events import Runtime, WireEvent


@dataclass(kw_only=True)
class Deps(ABC):
    """Base of an agent's dependencies. May be reused for the session's next turn.

    `add_info()` and `add_error()` are for tools. `add_node_begin()`, `add_node_event()` and `add_node_end()` are for
    those who drive an agent by hand between `start()` and `stop()`; `run()` needs none of them.

    Args:
        user_id: whose conversation it is.
        session_id: which of the user's.
        follows: the traceparent of the message that caused the run, where that belongs to another trace; the run's
            span gets a link to it.
        runtime: what of the run has become events so far; `run()` makes it.
    """

    user_id: Id
    session_id: Id
    follows: str | None = field(default=None, compare=False)
    runtime: Runtime = field(default_factory=Runtime, repr=False, compare=False)

    @abstractmethod
    def get_scope_id(self) -> Id:
        """Return the tenant that everything of this run is inside of."""

    async def add_node_begin(self, node: object) -> None:
        """Append `llm-begin`; `node` is pydantic-ai's model request node."""
        await self._add(self.runtime.begin_node())

    async def add_node_event(self, event: object) -> None:
        """Append an event of pydantic-ai's, if it is one that listeners see."""
        if (wire := self.runtime.convert(event)) is not None:
            await self._add(wire)

    async def add_node_end(self) -> None:
        """Append `llm-end`."""
        await self._add(self.runtime.end_node())

    async def add_error(self, body: dict[str, Any], origin: str = RUNTIME) -> None:
        """Append an `error` for the listeners; it does not end the run.

        Args:
            body: what listeners get.
            origin: the source of the event, any name; by default `opale`.

        Raises:
            BodyError: the body is not a JSON object.
            TypeError: `origin` is not a str.
            ValueError: `origin` has a lone surrogate.
            RedisUnavailableError: the session is not open in this process, and Redis can't be reached.
        """
        await self._append("error", origin, body)

    async def add_info(self, body: dict[str, Any], origin: str = RUNTIME) -> None:
        """Append an `info` for the listeners; arguments and errors as for `add_error()`."""
        await self._append("info", origin, body)

    async def _add(self, event: WireEvent) -> None:
        await stream.append(
            self.get_scope_id(), self.user_id, self.session_id, type="event", origin=AGENT, body=event.body
        )

    async def _append(self, type: str, origin: str, body: Body) -> None:
        await stream.add(self.get_scope_id(), self.user_id, self.session_id, type=type, origin=origin, body=body)
