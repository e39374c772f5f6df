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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_ai.models import Model, infer_model

from ..control.cancellation import cancel
from ..embedded.child import Child
from ..errors import AgxCanceledError, AgxError
from ..facts.schema import Outcome
from ..listeners.listener import listen
from ..runs.runner import run
from ..sessions.redis_session import RedisSession
from ..testing import MemorySession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .finished_runs import (
    FinishedRun,
    FinishedRuns,
    count_tokens,
    has_all_usage,
)
from .run_view import RunView
from .scenarios import Scenario

LEASE_TTL = 3.0  # seconds; short, so that a killed process is noticed while people still look
_LAST_EVENT = 10.0  # seconds
_LOOK = 1.0  # seconds without an event after which a listener begins anew, after what it has seen
_PATIENCE = 60.0  # seconds without an event after which the sidecar has failed
_PEOPLE = (("acme", "ada"), ("globex", "lin"), ("acme", "sam"), ("initech", "kim"))


@dataclass(frozen=True, slots=True)
class ModuleProcess:
    """A module of the demo that runs as a process of its own, and the file with its output."""

    child: Child
    log: Path

    def check(self) -> None:
        """Raise AgxError with its output if it has ended."""
        if self.child.ended:
            raise AgxError(f"process {self.child.pid} ended early:\n{self.log.read_text(errors='replace')[-2_000:]}")


@contextmanager
def start_module(name: str, *arguments: str, beside: ModuleProcess | None = None) -> Iterator[ModuleProcess]:
    """Run a module of this package as a process of its own; it ends with the `with` block at the latest.

    Args:
        beside: a process in whose directory this one's is made. It is removed with that one if the demo is killed, also
            where this process is not guarded: while it starts, and after its kill.
    """
    home = Path(tempfile.mkdtemp(prefix="agx-demo-", dir=None if beside is None else beside.log.parent))
    child = Child([sys.executable, "-m", f"{__package__}.{name}", *arguments], log=home / "log", home=home)
    try:
        yield ModuleProcess(child, home / "log")
    finally:
        if not child.ended:
            child.end()
        shutil.rmtree(home, ignore_errors=True)


class Traffic:
    """The demo's users.

    Args:
        redis_url: for the processes that are killed.
        model: pydantic-ai's name of a model; None for the scripted one, which needs no key and no network.
        finished_runs: each run is added to it when it has ended.
        on_begin: called when a run begins.
        on_end: called when a run has ended.
        worker: the process that resumes runs; None where none does, and no scenario needs it.
    """

    def __init__(
        self,
        redis_url: str,
        model: str | None,
        finished_runs: FinishedRuns,
        *,
        on_begin: Callable[[RunView], None],
        on_end: Callable[[FinishedRun], None],
        worker: ModuleProcess | None = None,
    ) -> None:
        self._redis_url = redis_url
        self._model_name = model
        self._model = find_model(model) if model else None
        self._finished_runs = finished_runs
        self._on_begin = on_begin
        self._on_end = on_end
        self._worker = worker
        self._numbers = itertools.count(1)

    async def play(self, scenario: Scenario) -> None:
        """Run one scenario to its end; raise AgxError only where agx itself could not work."""
        number = next(self._numbers)
        scope, user = _PEOPLE[number % len(_PEOPLE)]
        view = RunView(scope, user, f"chat-{number}", scenario.agent, scenario.prompt)
        self._on_begin(view)
        finished = await (
            self._run_here(view, scenario) if scenario.kill_after is None else self._run_in_a_process(view, scenario)
        )
        view.finish(finished)
        self._finished_runs.runs.append(finished)
        self._on_end(finished)

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
            view.show(event)
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
        requests = None if self._model else deps.model_requests
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
        """Run it in a process of its own and kill that in the middle; the worker or the sidecar has to notice."""
        arguments = [self._redis_url, view.scope, view.user, view.session, scenario.prompt]
        if self._model_name:
            arguments.append(self._model_name)
        killed_at: float | None = None
        with start_module("killed_process", *arguments, beside=self._worker) as process:
            async for event in self._read_until_end(view, process, scenario):
                view.show(event)
                if event["type"] == "begin":
                    view.began = time.perf_counter()
                elif event["type"] == "resume":
                    view.note = f"{self._resumer} resumed the run"
                if killed_at is None and len(view.text) >= (scenario.kill_after or 0):
                    process.child.end(signal.SIGKILL)
                    killed_at = time.perf_counter()
                    view.note = f"process {process.child.pid} was killed"
            ended_at = time.perf_counter()
            if killed_at is None:  # a real model's answer was short: the process still writes its last facts
                await asyncio.to_thread(process.child.wait, _LAST_EVENT)
        lost = killed_at is not None and not scenario.resumable
        killed = f"process {process.child.pid} was killed"
        session = RedisSession(view.scope, view.user, view.session)
        await session.load()
        complete = killed_at is None and has_all_usage(session.msgs, "completed", None)
        # Nobody received the usage of a killed process's request. If the run is resumed, agx estimates it.
        return FinishedRun(
            scope=view.scope,
            user=view.user,
            session=view.session,
            agent=scenario.agent,
            outcome="lost" if lost else "completed",
            reason=None,
            error_type="lost" if lost else None,
            tokens=count_tokens(session.msgs),
            all_reported=complete or (lost and self._model is None),
            tool_calls=Counter(view.tool_calls),
            model_requests=view.model_requests if self._model is None else None,
            seconds=(killed_at if lost and killed_at else ended_at) - view.began,
            resumes=int(killed_at is not None and scenario.resumable),
            note="" if killed_at is None else killed if lost else f"{killed}, {view.note}",
        )

    async def _read_until_end(
        self, view: RunView, process: ModuleProcess, scenario: Scenario
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield events up to the `end`, also while this process shuts down and closes its listeners."""
        last: str | None = None
        patience = time.monotonic() + _PATIENCE
        while time.monotonic() < patience:
            if last is None:
                process.check()
            if scenario.resumable and self._worker is not None:
                self._worker.check()
            async for event in listen(
                view.scope, view.user, view.session, serialize=False, after=last, wait=_LOOK, timeout=_LOOK
            ):
                last, patience = event["id"], time.monotonic() + _PATIENCE
                yield event
                if event["type"] == "end":
                    return
        raise AgxError(f"the run of {view.session} was killed, and nobody ended it within {_PATIENCE:.0f} s")

    @property
    def _resumer(self) -> str:
        return "another process" if self._worker is None else f"process {self._worker.child.pid}"


def find_model(name: str) -> Model:
    """Return a real model by pydantic-ai's name for it; raises AgxError where it can't be had."""
    try:
        return infer_model(name)
    except Exception as error:  # each provider's client has its own exception for a missing key
        raise AgxError(f"the model {name!r} can't be used: {error}") from None
