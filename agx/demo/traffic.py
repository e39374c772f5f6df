"""Plays scenes: starts a run, follows its stream as any other process could, presses stop where the scene says so."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_ai.models import Model, infer_model

from ..embedded.child import Child
from ..engine.cancellation import cancel
from ..errors import AgxCanceledError, AgxError
from ..facts.schema import Outcome
from ..listeners.listener import listen
from ..runs.runner import run
from ..testing import MemorySession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .ledger import (
    Ledger,
    Ran,
    count_tokens,
    has_all_usage,
)
from .scenes import Scene

LEASE_TTL = 3.0  # seconds; short, so that a killed process is noticed while people still look
_LAST_EVENT = 10.0  # seconds
_LOOK = 1.0  # seconds of silence after which a listener begins anew, behind what it has seen
_PATIENCE = 60.0  # seconds of silence after which the sidecar has failed
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
    """The demo's users. `model`: None lets a scripted model play, without a key and without the network.

    `redis_url` is for the processes that are going to be killed; `on_begin` and `on_end` tell of each run.
    """

    def __init__(
        self,
        redis_url: str,
        model: str | None,
        ledger: Ledger,
        *,
        on_begin: Callable[[Card], None],
        on_end: Callable[[Ran], None],
    ) -> None:
        self._redis_url = redis_url
        self._model_name = model
        self._model = find_model(model) if model else None
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
        card.ran = await (self._play_here(card, scene) if scene.kill_after is None else self._play_apart(card, scene))
        self._ledger.ran.append(card.ran)
        self._on_end(card.ran)

    async def _play_here(self, card: Card, scene: Scene) -> Ran:
        """Run it in this process, and follow it as any other process could."""
        follower = asyncio.create_task(self._follow(card, scene))
        try:
            ran = await self._run(card, scene)
            # The run returned, so its `end` is in the stream: whoever follows it must be done in a moment.
            async with asyncio.timeout(_LAST_EVENT):
                await follower
        finally:
            follower.cancel()
        return ran

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

    async def _play_apart(self, card: Card, scene: Scene) -> Ran:
        """Run it in a process of its own and kill that in the middle; the sidecar has to find out and end the run."""
        home = Path(tempfile.mkdtemp(prefix="agx-demo-"))
        arguments = [self._redis_url, card.scope, card.user, card.session]
        if self._model_name:
            arguments.append(self._model_name)
        process = Child([sys.executable, "-m", "agx.demo.doomed", *arguments], log=home / "log", home=home)
        killed = False
        try:
            async for body in self._resume_until_end(card, process, home / "log"):
                card.show(body)
                if not killed and len(card.text) >= (scene.kill_after or 0):
                    process.end(signal.SIGKILL)
                    killed = True
            if not killed:  # a real model's answer was short: the process has yet to tell its last facts
                await asyncio.to_thread(process.wait, _LAST_EVENT)
        finally:
            if not killed:
                process.end()
            shutil.rmtree(home, ignore_errors=True)
        return Ran(
            scope=card.scope,
            user=card.user,
            session=card.session,
            agent=scene.agent,
            outcome="lost" if killed else "completed",
            reason=None,
            error_type="lost" if killed else None,
            # What its one answer had used died with the process, and nobody makes it up.
            tokens=Counter(),
            all_reported=self._model is None,
            tool_calls=Counter(),
            model_requests=1 if self._model is None else None,
            seconds=time.perf_counter() - card.began,
        )

    async def _resume_until_end(self, card: Card, process: Child, log: Path) -> AsyncIterator[dict[str, Any]]:
        """Yield bodies up to the `end`, through this process's own shutdown, which closes what it listens with."""
        last: str | None = None
        patience = time.monotonic() + _PATIENCE
        while time.monotonic() < patience:
            if last is None and process.ended:
                raise AgxError(f"the process that was to be killed did not get so far:\n{_tail(log)}")
            async for event in listen(
                card.scope, card.user, card.session, serialize=False, after=last, wait=_LOOK, timeout=_LOOK
            ):
                last, patience = event["id"], time.monotonic() + _PATIENCE
                yield event["body"]
                if event["type"] == "end":
                    return
        raise AgxError(f"the run of {card.session} was killed, and nobody ended it within {_PATIENCE:.0f} s")


def find_model(name: str) -> Model:
    """Return a real model by pydantic-ai's name for it; raises AgxError where it can't be had."""
    try:
        return infer_model(name)
    except Exception as error:  # each provider's client has its own words for a missing key
        raise AgxError(f"the model {name!r} can't be used: {error}") from None


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2_000:]
