"""Runs that a request starts and that outlive it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from fastapi import HTTPException
from pydantic_ai import RunContext
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import AbstractCapability

from ..checkpoints.job import Job
from ..checkpoints.progress import fingerprint
from ..control.on_busy import OnBusy
from ..errors import AgxError, SteeredError
from ..jobs.front_end import ARGUMENT, add_front_end
from ..jobs.recipe import Call, Recipe
from ..jobs.worker import Worker
from ..redis.keys import Id
from ..runs.deps import Deps
from ..runs.drive import is_prompt
from ..runs.lifecycle import enclosing_recorder
from ..runs.outcome import classify_error
from ..runs.runner import run_turn
from ..sessions.base import SessionStore
from ..sessions.lost_answer import read_lost_answer
from ..stream.entry import PROMPT
from .route import Lifespan, RefusedError
from .turns import Turn, TurnSession, refusing_unreadable, text_of

logger = logging.getLogger("agx")

MakeDeps = Callable[[Id, Id, str], Deps]  # of scope, user and session
Recipes = Mapping[str, Recipe]

_AT_ONCE = 100  # runs of other processes that a replica goes on with at the same time


@dataclass(frozen=True, slots=True)
class Who:
    """Whom a request was authorized as."""

    scope_id: Id
    user_id: Id


@dataclass(frozen=True, slots=True)
class Runs:
    """Starts an agent's runs; `kwargs` reach `agx.run()`.

    Args:
        recipe: name of the recipe with which another process goes on with the runs; None where none can.
    """

    agent: AbstractAgent[Any, Any]
    sessions: SessionStore
    make_deps: MakeDeps
    kwargs: dict[str, Any]
    recipe: str | None = None

    def __post_init__(self) -> None:
        check_deps(self.agent, self.make_deps)

    async def start(
        self,
        who: Who,
        session_id: str,
        turn: Turn,
        on_busy: OnBusy = "reject",
        front_end: Mapping[str, Any] | None = None,
    ) -> str:
        """Start a run in a task of its own, and return its id once its agent begins, or the id of the one it steers.

        Args:
            front_end: `tools` and `state` of the front end; the run's job stores them too.

        Raises:
            SessionBusyError: the session has a live run.
            QueueFullError: too many runs or messages wait for the session.
            JobError: `on_busy` has an unknown value.
            ConversationChangedError: the turn does not fit the stored conversation.
            RedisUnavailableError: Redis can't be reached.
            RefusedError: the state does not fit the deps, or a tool has the name of one of the agent's; or the store or
                `make_deps` raised another exception, which the log has.
        """
        # Before the run begins: its `begin` replaces the stream of the run before.
        answer = await read_lost_answer(who.scope_id, who.user_id, session_id)
        with refusing_failures():
            stored = self.sessions.open(who.scope_id, who.user_id, session_id)
            session = TurnSession(stored=stored, turn=turn, lost_answer=answer)
            if turn.prompt is None:
                # Once more while the run has the session for itself; but what can be refused here costs no run.
                await session.load()
            deps = self.make_deps(who.scope_id, who.user_id, session_id)
            if not isinstance(deps, Deps):
                raise TypeError(f"make_deps must return a subclass of agx.Deps, not {type(deps).__name__}")
        asked = WebRun(session=session)
        kwargs = self._add_front_end(deps, front_end)
        kwargs["capabilities"] = [*(kwargs.get("capabilities") or ()), asked]
        if turn.results is not None:
            kwargs["deferred_tool_results"] = turn.results
        goes_on_from: str | None = None
        if turn.prompt is None and turn.results is None:
            # Another process that goes on with the run before there is a new answer must not take the old one for it.
            goes_on_from = fingerprint(session.msgs)
            session.branch = self.sessions.open(who.scope_id, who.user_id, uuid.uuid4().hex, parent=session_id)
        resume, args = kwargs.pop("resume", None), kwargs.pop("args", None)
        work = run_turn(
            session, self.agent, turn.prompt, deps, kwargs,
            resume=self.recipe or resume, args=args, on_busy=on_busy, goes_on_from=goes_on_from,
        )  # fmt: skip
        running = asyncio.create_task(work, name="agx-web-run")
        running.add_done_callback(_retrieve)
        # A client that goes away cancels this wait, not the run.
        first: set[asyncio.Future[Any]] = {running, asked.begun}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not asked.begun.done():
            try:
                with refusing_failures(logged=True):
                    await running
            except SteeredError as steered:
                return steered.run_id
        return await asked.begun

    def _add_front_end(self, deps: Deps, front_end: Mapping[str, Any] | None) -> dict[str, Any]:
        if front_end is None:
            return dict(self.kwargs)
        own = {ARGUMENT: front_end}
        with refusing_unreadable("The tools or the state"):
            kwargs = add_front_end(self.agent, deps, self.kwargs, own)
        if self.recipe is not None or kwargs.get("resume") is not None:
            kwargs["args"] = {**(kwargs.get("args") or {}), **own}
        return kwargs


@dataclass
class WebRun(AbstractCapability[Any]):
    """Puts the prompt on the session's stream, for pages that join before the session is saved."""

    _: KW_ONLY
    session: TurnSession
    begun: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    id: str | None = "agx-asked"

    async def before_run(self, ctx: RunContext[Any]) -> None:
        recorder = enclosing_recorder()
        assert recorder is not None
        prompt, messages = self.session.turn.prompt, self.session.msgs
        stored = prompt is not None and is_prompt(messages[-1:], prompt)  # by an earlier attempt
        body = {
            "prompt": None if prompt is None else text_of(prompt),
            "after": len(messages) - stored,
            # pydantic-ai's own id, which is in the messages: it shows whether they have been saved.
            "stamp": ctx.run_id,
        }
        recorder.events.put("info", PROMPT, body, when="now")
        self.begun.set_result(recorder.run_id)


@dataclass
class PlainDeps(Deps):
    """The deps of agents that need none of their own."""

    scope_id: Id

    def get_scope_id(self) -> Id:
        return self.scope_id


def make_plain_deps(scope_id: Id, user_id: Id, session_id: str) -> PlainDeps:
    return PlainDeps(scope_id, user_id=user_id, session_id=session_id)


def check_deps(agent: AbstractAgent[Any, Any], make_deps: MakeDeps) -> None:
    """Raise TypeError if its signature or the agent's type shows that `make_deps` can't make the agent's deps."""
    wanted = agent.deps_type
    if make_deps is make_plain_deps:
        if isinstance(wanted, type) and not issubclass(PlainDeps, wanted) and wanted is not type(None):
            raise TypeError(
                f"agent {agent.name!r} takes deps of type {wanted.__name__}: give the router make_deps=, which makes "
                "one, a subclass of agx.Deps, of a scope, a user and a session"
            )
        return
    if inspect.iscoroutinefunction(make_deps):
        raise TypeError("make_deps must be a plain function: what it has to await belongs in the tools")
    try:
        inspect.signature(make_deps).bind("scope", "user", "session")
    except TypeError as error:
        raise TypeError(f"make_deps must take the scope, the user and the session, in this order: {error}") from None
    except ValueError:
        pass  # a callable that has no signature


@contextmanager
def refusing_failures(*, logged: bool = False) -> Iterator[None]:
    """Turn an exception of the user's code into 500 with a sentence and a code, and log it.

    Args:
        logged: `run()` has logged the exception already.
    """
    try:
        yield
    except (HTTPException, AgxError):
        raise
    except Exception as error:
        if not logged:
            logger.exception("agx: a run could not be started")
        raise RefusedError(classify_error(error), status=500) from error


def _retrieve(running: asyncio.Task[Any]) -> None:
    """Retrieve the exception of a task that nobody awaits: `run()` has logged it."""
    if not running.cancelled():
        running.exception()


# --- runs that another replica of the service goes on with ---


def find_recipe(agent: AbstractAgent[Any, Any], recipes: Recipes | None) -> str | None:
    """Return the name of the recipe that resumes an agent's runs; None where the router has no recipes.

    Raises:
        ValueError: none of them is the agent's.
    """
    if recipes is None:
        return None
    if agent.name is None or agent.name not in recipes:
        raise ValueError(f"recipes must have one for the router's agent, under its name {agent.name!r}")
    return agent.name


def make_lifespan(recipes: Recipes | None) -> Lifespan | None:
    """Return the lifespan of a router: while the app runs, it goes on with runs whose process died."""
    if recipes is None:
        return None
    resumed = {name: _as_web_run(recipe) for name, recipe in recipes.items()}

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker = Worker(resumed, at_once=_AT_ONCE)
        recovering = asyncio.create_task(worker.recover(), name="agx-web-recovery")
        try:
            yield
        finally:
            worker.stop()
            await recovering

    return lifespan


def _as_web_run(recipe: Recipe) -> Recipe:
    """Return a recipe whose run shows and stores what a router's run does."""

    async def make(job: Job) -> Call:
        call = await recipe(job)
        # The conversation is prepared already: the turn's first attempt has stored it.
        session = TurnSession(stored=call.session, turn=Turn(job.prompt, list))
        capabilities = [*(call.kwargs.get("capabilities") or ()), WebRun(session=session)]
        return replace(call, session=session, kwargs={**call.kwargs, "capabilities": capabilities})

    return make
