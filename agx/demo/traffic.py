"""Runs the scenarios: starts a run, follows its stream as any process could, cancels it where the scenario does."""

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
from .finished_runs import (
    FinishedRun,
    FinishedRuns,
    count_tokens,
    has_all_usage,
)
from .scenarios import Scenario

LEASE_TTL = 3.0  # seconds; short, so that a killed process is noticed while people still look
_LAST_EVENT = 10.0  # seconds
_LOOK = 1.0  # seconds without an event after which a listener begins anew, behind what it has seen
_PATIENCE = 60.0  # seconds without an event after which the sidecar has failed
_PEOPLE = (("acme", "ada"), ("globex", "lin"), ("acme", "sam"), ("initech", "kim"))


@dataclass(slots=True)
class RunView:
    """What a listener has received of one run, for the screen."""

    scope: str
    user: str
    session: str
    agent: str
    prompt: str
    began: float = field(default_factory=time.perf_counter)
    calls: dict[str, tuple[str, str]] = field(default_factory=dict)  # tool calls by id: what was called, its outcome
    text: str = ""
    thinking: bool = False
    finished: FinishedRun | None = None

    def show(self, body: dict[str, Any]) -> None:
        """Add the body of an event."""
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
    """The demo's users.

    Args:
        redis_url: for the processes that are killed.
        model: pydantic-ai's name of a model; None for the scripted one, which needs no key and no network.
        finished_runs: each run is added to it when it has ended.
        on_begin: called when a run begins.
        on_end: called when a run has ended.
    """

    def __init__(
        self,
        redis_url: str,
        model: str | None,
        finished_runs: FinishedRuns,
        *,
        on_begin: Callable[[RunView], None],
        on_end: Callable[[FinishedRun], None],
    ) -> None:
        self._redis_url = redis_url
        self._model_name = model
        self._model = find_model(model) if model else None
        self._finished_runs = finished_runs
        self._on_begin = on_begin
        self._on_end = on_end
        self._numbers = itertools.count(1)

    async def play(self, scenario: Scenario) -> None:
        """Run one scenario to its end; raise AgxError only where agx itself could not work."""
        number = next(self._numbers)
        scope, user = _PEOPLE[number % len(_PEOPLE)]
        view = RunView(scope, user, f"chat-{number}", scenario.agent, scenario.prompt)
        self._on_begin(view)
        view.finished = await (
            self._run_here(view, scenario) if scenario.kill_after is None else self._run_in_a_process(view, scenario)
        )
        self._finished_runs.runs.append(view.finished)
        self._on_end(view.finished)

    async def _run_here(self, view: RunView, scenario: Scenario) -> FinishedRun:
        """Run it in this process, and follow it as any other process could."""
        follower = asyncio.create_task(self._follow(view, scenario))
        try:
            ran = await self._run(view, scenario)
            # The run returned, so its `end` is in the stream: the follower must finish soon.
            async with asyncio.timeout(_LAST_EVENT):
                await follower
        finally:
            follower.cancel()
        return ran

    async def _follow(self, view: RunView, scenario: Scenario) -> None:
        cancelled = False
        async for event in listen(view.scope, view.user, view.session, serialize=False):
            body: dict[str, Any] = event["body"]
            view.show(body)
            due = (
                body.get("part_kind") == scenario.cancel_after.replace(" ", "-")
                if isinstance(scenario.cancel_after, str)
                else scenario.cancel_after is not None and len(view.text) >= scenario.cancel_after
            )
            if due and not cancelled:
                cancelled = await cancel(view.scope, view.user, view.session)

    async def _run(self, view: RunView, scenario: Scenario) -> FinishedRun:
        session = MemorySession(view.session)
        deps = DemoDeps(user_id=view.user, session_id=view.session, scope_id=view.scope)
        model = self._model or ScriptedModel(scenario)
        outcome: Outcome = "completed"
        reason: str | None = None
        error_type: str | None = None
        try:
            await run(session, AGENTS[scenario.agent], scenario.prompt, deps, model=model)
        except AgxCanceledError as error:
            outcome, reason = "cancelled", error.reason
        except AgxError:
            raise  # agx could not work: no scenario asks for that
        except Exception as error:
            outcome, error_type = "failed", f"{type(error).__module__}.{type(error).__qualname__}"
        requests = model.requests if isinstance(model, ScriptedModel) else None
        return FinishedRun(
            scope=view.scope,
            user=view.user,
            session=view.session,
            agent=scenario.agent,
            outcome=outcome,
            reason=reason,
            error_type=error_type,
            tokens=count_tokens(session.msgs),
            all_reported=has_all_usage(session.msgs, outcome, requests),
            tool_calls=Counter(deps.tool_calls),
            model_requests=requests,
            seconds=time.perf_counter() - view.began,
        )

    async def _run_in_a_process(self, view: RunView, scenario: Scenario) -> FinishedRun:
        """Run it in a process of its own and kill that in the middle; the sidecar has to notice and end the run."""
        home = Path(tempfile.mkdtemp(prefix="agx-demo-"))
        arguments = [self._redis_url, view.scope, view.user, view.session]
        if self._model_name:
            arguments.append(self._model_name)
        process = Child([sys.executable, "-m", "agx.demo.killed_process", *arguments], log=home / "log", home=home)
        killed = False
        try:
            async for body in self._resume_until_end(view, process, home / "log"):
                view.show(body)
                if not killed and len(view.text) >= (scenario.kill_after or 0):
                    process.end(signal.SIGKILL)
                    killed = True
            if not killed:  # a real model's answer was short: the process still writes its last facts
                await asyncio.to_thread(process.wait, _LAST_EVENT)
        finally:
            if not killed:
                process.end()
            shutil.rmtree(home, ignore_errors=True)
        return FinishedRun(
            scope=view.scope,
            user=view.user,
            session=view.session,
            agent=scenario.agent,
            outcome="lost" if killed else "completed",
            reason=None,
            error_type="lost" if killed else None,
            # The usage of its one answer was lost with the process; nobody invents it.
            tokens=Counter(),
            all_reported=self._model is None,
            tool_calls=Counter(),
            model_requests=1 if self._model is None else None,
            seconds=time.perf_counter() - view.began,
        )

    async def _resume_until_end(self, view: RunView, process: Child, log: Path) -> AsyncIterator[dict[str, Any]]:
        """Yield bodies up to the `end`, also while this process shuts down and closes its listeners."""
        last: str | None = None
        patience = time.monotonic() + _PATIENCE
        while time.monotonic() < patience:
            if last is None and process.ended:
                raise AgxError(f"the process ended before it could be killed:\n{_tail(log)}")
            async for event in listen(
                view.scope, view.user, view.session, serialize=False, after=last, wait=_LOOK, timeout=_LOOK
            ):
                last, patience = event["id"], time.monotonic() + _PATIENCE
                yield event["body"]
                if event["type"] == "end":
                    return
        raise AgxError(f"the run of {view.session} was killed, and nobody ended it within {_PATIENCE:.0f} s")


def find_model(name: str) -> Model:
    """Return a real model by pydantic-ai's name for it; raises AgxError where it can't be had."""
    try:
        return infer_model(name)
    except Exception as error:  # each provider's client has its own exception for a missing key
        raise AgxError(f"the model {name!r} can't be used: {error}") from None


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2_000:]
