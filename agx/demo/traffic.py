"""Plays scenes: starts a run, follows its stream as any other process could, presses stop where the scene says so."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai.models import Model

from ..canceller import cancel
from ..errors import AgxCanceledError, AgxError
from ..facts import Outcome
from ..listener import listen
from ..runner import run
from ..testing import MemorySession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .ledger import Ledger, Ran, count_tokens, has_all_usage
from .scenes import Scene

_LAST_EVENT = 10.0  # seconds
_PEOPLE = (("acme", "ada"), ("globex", "lin"), ("acme", "sam"), ("initech", "kim"))


@dataclass(slots=True)
class Card:
    """What a listener knows of one run, for the screen."""

    scope: str
    user: str
    session: str
    agent: str
    prompt: str
    began: float = field(default_factory=time.perf_counter)
    calls: dict[str, tuple[str, str]] = field(default_factory=dict)  # tool calls by id: what was called, its outcome
    text: str = ""
    thinking: bool = False
    ran: Ran | None = None

    def show(self, body: dict[str, Any]) -> None:
        """Take in the body of an event."""
        kind = body.get("part_kind")
        if kind in ("text", "thinking"):
            self.thinking = kind == "thinking"
            if not self.thinking:
                self.text += body.get("content", "") + body.get("content_delta", "")
        elif kind == "tool-call":
            self.thinking = False
            args = ", ".join(str(value) for value in body["args"].values())
            self.calls[body["tool_call_id"]] = f"{body['tool_name']}({args})", "…"
        elif (call_id := body.get("tool_call_id")) in self.calls and "tool_outcome" in body:
            self.calls[call_id] = self.calls[call_id][0], body["tool_outcome"]


class Traffic:
    """The demo's users. `model`: None lets a scripted model play, without a key and without the network."""

    def __init__(
        self, model: Model | None, ledger: Ledger, *, on_begin: Callable[[Card], None], on_end: Callable[[Ran], None]
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._on_begin = on_begin
        self._on_end = on_end
        self._numbers = itertools.count(1)

    async def play(self, scene: Scene) -> None:
        """Play one scene to its end; raises AgxError only where the runtime itself could not work."""
        number = next(self._numbers)
        scope, user = _PEOPLE[number % len(_PEOPLE)]
        card = Card(scope, user, f"chat-{number}", scene.agent, scene.prompt)
        self._on_begin(card)
        follower = asyncio.create_task(self._follow(card, scene))
        try:
            card.ran = await self._run(card, scene)
            # The run returned, so its `end` is in the stream: whoever follows it must be done in a moment.
            async with asyncio.timeout(_LAST_EVENT):
                await follower
        finally:
            follower.cancel()
        self._ledger.ran.append(card.ran)
        self._on_end(card.ran)

    async def _follow(self, card: Card, scene: Scene) -> None:
        pressed = False
        async for event in listen(card.scope, card.user, card.session, serialize=False):
            body: dict[str, Any] = event["body"]
            card.show(body)
            due = (
                body.get("part_kind") == scene.cancel_after.replace(" ", "-")
                if isinstance(scene.cancel_after, str)
                else scene.cancel_after is not None and len(card.text) >= scene.cancel_after
            )
            if due and not pressed:
                pressed = await cancel(card.scope, card.user, card.session)

    async def _run(self, card: Card, scene: Scene) -> Ran:
        session = MemorySession(card.session)
        deps = DemoDeps(user_id=card.user, session_id=card.session, scope_id=card.scope)
        model = self._model or ScriptedModel(scene)
        outcome: Outcome = "completed"
        reason: str | None = None
        error_type: str | None = None
        try:
            await run(session, AGENTS[scene.agent], scene.prompt, deps, model=model)
        except AgxCanceledError as error:
            outcome, reason = "cancelled", error.reason
        except AgxError:
            raise  # the runtime could not work: nothing that a scene asks for
        except Exception as error:
            outcome, error_type = "failed", f"{type(error).__module__}.{type(error).__qualname__}"
        return Ran(
            scope=card.scope,
            user=card.user,
            session=card.session,
            agent=scene.agent,
            outcome=outcome,
            reason=reason,
            error_type=error_type,
            tokens=count_tokens(session.msgs),
            all_reported=has_all_usage(session.msgs),
            tool_calls=Counter(deps.tool_calls),
            model_requests=model.requests if isinstance(model, ScriptedModel) else None,
            seconds=time.perf_counter() - card.began,
        )
