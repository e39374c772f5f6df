"""`Worker`: runs submitted jobs and takes over runs whose process died, until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import Any

from ..engine.engine import Engine
from ..engine.registry import current_engine
from ..engine.signals import has_own_handler, stop_on_signals
from ..errors import AgxError
from ..fleet.fleet import read_clock
from ..redis import keys
from .attempt import resume_run, start_job
from .dead_runs import DeadRuns
from .decide import expire_calls
from .queue import JobQueue, Waiting
from .recipe import Recipe
from .resumable_run import ResumableRun, hand_over
from .submit import CLAIM_TTL, open_queue

logger = logging.getLogger("agx")

_POLL = 1.0  # seconds between two looks at the queue; a submit wakes the workers at once
_SWEEP = 0.5  # seconds between two looks for dead runs, plus or minus a quarter; a hand-over wakes the workers at once
_SPREAD = 0.05  # seconds over which the workers look after a hand-over
_BUSY_PAUSE = 1.0  # seconds before a job whose run could not begin is tried again
_MAKE_ROOM_MS = 10_000  # until one more worker makes room for a run that must run alone
_SUSPECT = 3  # claims from which on a job runs alone: two workers stopped before its run began
_EXPIRE_EVERY = 5.0  # seconds between two looks for calls on which nobody has decided in time
_SEEN_EVERY = 5.0  # seconds between two announcements of the agents that are served
_READY_WITHIN = 15.0  # seconds since the last announcement


class Worker:
    """Runs jobs of the agents it has recipes for.

    Args:
        recipes: by agent name, how to make an agent's run from a job.
        at_once: runs at the same time.
        per_scope: runs of one scope at the same time; None sets no limit.
        per_agent: runs of one agent at the same time; None sets no limit.
        grace: seconds at SIGTERM in which live runs may reach their next checkpoint; then they are interrupted, and
            another worker asks the model again.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        at_once: int = 20,
        *,
        per_scope: int | None = None,
        per_agent: int | None = None,
        grace: float = 20.0,
    ) -> None:
        if not recipes:
            raise ValueError('a worker needs recipes, for example Worker({"support": make_support})')
        if at_once < 1:
            raise ValueError("at_once must be at least 1")
        self.recipes = dict(recipes)
        self.at_once = at_once
        self._per_scope = per_scope
        self._per_agent = per_agent
        self._grace = grace
        self._name = uuid.uuid4().hex
        self._runs: dict[str, ResumableRun] = {}  # by lease member; also those that are about to begin
        self._tasks: dict[asyncio.Task[None], Waiting | None] = {}  # each with its job; None for a run taken over
        self._not_before: dict[str, float] = {}  # by entry id: the loop's time at which a job is tried again
        self._served = Counter[str]()  # by scope that has waiting jobs: how many of its jobs were started here
        self._makes_room = False  # nothing starts here until a run that must run alone has begun
        self._is_alone = False  # a run that may stop its worker is under way: nothing else starts
        self._announced_at: float | None = None  # the loop's time
        self._wake = asyncio.Event()  # a job may wait
        self._wake_takeover = asyncio.Event()  # a run was handed over
        self._wake_decided = asyncio.Event()  # a console has stored a decision
        self._stop = asyncio.Event()

    @property
    def running(self) -> int:
        """How many runs this worker has now."""
        return len(self._tasks)

    @property
    def is_ready(self) -> bool:
        """Whether this worker takes jobs: it is not stopping, and Redis has answered within the last 15 seconds."""
        if self._announced_at is None or self._stop.is_set():
            return False
        return asyncio.get_running_loop().time() - self._announced_at < _READY_WITHIN

    def stop(self) -> None:
        """Take no more work and hand the live runs over; `run()` then returns."""
        self._stop.set()

    async def run(self) -> None:
        """Work until SIGTERM, SIGINT or `stop()`; then hand the live runs over to other workers.

        In a process that handles SIGTERM itself, as uvicorn does, no signal is handled: call `stop()` at its shutdown.
        """
        with contextlib.nullcontext() if has_own_handler() else stop_on_signals(self._stop):
            await self._work(self._announce, self._take_jobs, self._take_over, self._expire_calls)

    async def recover(self) -> None:
        """Go on with runs whose process died, until `stop()`; submitted jobs and signals are left to others."""
        await self._work(self._take_over)

    async def _work(self, *loops: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
        engine = current_engine()
        tasks = [engine.supervisor.start(partial(loop, engine), name=f"agx-worker{loop.__name__}") for loop in loops]
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._hand_over()

    async def _hand_over(self) -> None:
        for run in list(self._runs.values()):
            hand_over(run)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._grace)
        for run in list(self._runs.values()):
            hand_over(run, now=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLAIM_TTL)

    # --- jobs ---

    async def _take_jobs(self, engine: Engine) -> None:
        await engine.ready()
        queue = open_queue(engine, self._name)
        channel = keys.jobs_wake_channel(engine.config.key_prefix)
        engine.subscription.subscribe(channel, self._on_wake, self._wake.set)
        try:
            while True:
                self._wake.clear()
                if self._has_room:
                    await self._start_jobs(engine, queue)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL):
                        await self._wake.wait()
        finally:
            engine.subscription.unsubscribe(channel)

    def _on_wake(self, message: bytes) -> None:
        events = {keys.WAKE_HANDED_OVER: self._wake_takeover, keys.WAKE_DECIDED: self._wake_decided}
        events.get(message, self._wake).set()

    async def _start_jobs(self, engine: Engine, queue: JobQueue) -> None:
        assert engine.queues.partitions is not None
        listed = await asyncio.gather(*(queue.waiting(n) for n in range(engine.queues.partitions)))
        waiting = [job for jobs in listed for job in jobs]
        now_ms = engine.clock.now_ms()
        for job in self._pick(waiting, now_ms):
            if not self._has_room:
                return
            claims = await queue.claim(job)
            if claims and not self._has_room:
                await queue.give_back(job)  # a run was taken over meanwhile
                return
            if claims >= _SUSPECT and self.running:
                # It may have stopped the workers before this one: it runs where no other run can be stopped with it.
                self._postpone(job.entry_id)
                await queue.give_back(job)
            elif claims:
                self._served[job.scope] += 1
                self._start(job.entry_id, self._job(engine, queue, job, claims), job, alone=claims >= _SUSPECT)
        await self._end_not_served(engine, queue, waiting, now_ms)

    async def _end_not_served(self, engine: Engine, queue: JobQueue, waiting: list[Waiting], now_ms: int) -> None:
        """End as failed the jobs that have waited `recover` seconds for an agent that no worker serves."""
        others = [job for job in waiting if job.agent not in self.recipes and job.due_ms <= now_ms]
        key, now = keys.workers(engine.config.key_prefix), asyncio.get_running_loop().time()
        for job in others:
            if not self._has_room:
                return
            if self._is_passed(job) or (found := await queue.read(job)) is None:
                continue
            seen = await engine.control.execute("ZSCORE", key, job.agent)
            left_ms = max(job.due_ms, int(float(seen or 0))) + found.recover * 1_000 - now_ms
            if left_ms > 0:
                self._not_before[job.entry_id] = now + left_ms / 1_000
            elif claims := await queue.claim(job):
                if not self._has_room:
                    await queue.give_back(job)
                    return
                self._start(job.entry_id, self._job(engine, queue, job, claims), job)

    @property
    def _has_room(self) -> bool:
        return self.running < self.at_once and not self._is_alone and not self._makes_room

    def _pick(self, waiting: list[Waiting], now_ms: int) -> Iterator[Waiting]:
        """Yield the jobs to start, in turn by scope.

        The scope with the fewest runs here comes first; among equal ones, the scope with the fewest jobs started here
        since it has waiting jobs. The oldest job of a scope comes first.
        """
        now = asyncio.get_running_loop().time()
        self._not_before = {entry_id: at for entry_id, at in self._not_before.items() if at > now}
        by_scope: dict[str, list[Waiting]] = {}
        # Of a session, only the oldest job may begin, and none while a run of it is here: they begin in order.
        taken = {(scope, session) for scope, session, _ in self._under_way()}
        for job in waiting:
            if job.due_ms > now_ms or (job.session and (job.scope, job.session) in taken):
                continue
            taken.add((job.scope, job.session))
            if job.agent in self.recipes and not self._is_passed(job):
                by_scope.setdefault(job.scope, []).append(job)
        for jobs in by_scope.values():
            jobs.reverse()
        least = min((self._served[scope] for scope in by_scope if scope in self._served), default=0)
        # A scope that is new here has no credit for the time before.
        self._served = Counter({scope: max(self._served[scope], least) for scope in by_scope})
        served = Counter(self._served)
        scopes = Counter(scope for scope, _, _ in self._under_way())
        agents = Counter(agent for _, _, agent in self._under_way())
        while by_scope:
            scope = min(by_scope, key=lambda name: (scopes[name], served[name], by_scope[name][-1].entry_id))
            job = by_scope[scope].pop()
            if not by_scope[scope] or (self._per_scope is not None and scopes[scope] >= self._per_scope):
                del by_scope[scope]
            if self._per_scope is not None and scopes[scope] >= self._per_scope:
                continue
            if self._per_agent is not None and agents[job.agent] >= self._per_agent:
                continue
            scopes[scope] += 1
            served[scope] += 1
            agents[job.agent] += 1
            yield job

    def _job(self, engine: Engine, queue: JobQueue, job: Waiting, claims: int) -> Coroutine[Any, Any, None]:
        return start_job(
            engine, queue, job, recipes=self.recipes, claims=claims, runs=self._runs, postpone=self._postpone
        )

    @property
    def _jobs(self) -> list[Waiting]:
        """The jobs of this worker, from when they are claimed until their runs have ended."""
        return [job for job in self._tasks.values() if job is not None]

    def _under_way(self) -> list[tuple[str, str, str]]:
        """Return scope, session and agent of each run of this worker, also of those that are about to begin."""
        taken_over = [run for run in self._runs.values() if run.due_ms is None]
        return [(job.scope, job.session, job.agent) for job in self._jobs] + [
            (run.session.scope, f"{run.session.user}:{run.session.session}", run.agent) for run in taken_over
        ]

    def _is_passed(self, job: Waiting) -> bool:
        """Whether a job is not to be started now: it is tried later, or it is being started already."""
        return job.entry_id in self._not_before or any(job.entry_id == one.entry_id for one in self._jobs)

    def _postpone(self, entry_id: str) -> None:
        """Try a job again later."""
        self._not_before[entry_id] = asyncio.get_running_loop().time() + _BUSY_PAUSE

    # --- runs whose process died ---

    async def _take_over(self, engine: Engine) -> None:
        await engine.ready()
        dead_runs = DeadRuns(engine, self.recipes, known=self._runs, takes=self._takes)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP * random.uniform(0.75, 1.25)):
                    await self._wake_takeover.wait()
                    # A random delay: the first worker takes the lease, and the others do not read the run's stream.
                    await asyncio.sleep(random.uniform(0, _SPREAD))
            self._wake_takeover.clear()
            if self.running >= self.at_once or self._is_alone:
                continue
            async for dead in dead_runs.find():
                work = resume_run(engine, dead, self.recipes[dead.job.agent], self._runs)
                self._start(dead.run_id, work, alone=dead.must_run_alone)
            await self._make_room(engine, is_needed=bool(dead_runs.waiting))

    def _takes(self, alone: bool) -> bool:
        return not self.running if alone else self._has_room

    async def _make_room(self, engine: Engine, *, is_needed: bool) -> None:
        """Start nothing more while runs wait for a worker without other runs, unless another worker has just begun to.

        The first worker that is empty takes such a run. As long as none is, one more makes room every 10 seconds: the
        runs of the first one may be long.
        """
        room = keys.room(engine.config.key_prefix)
        if self._is_alone or not is_needed:
            if self._makes_room:
                self._makes_room = False
                await engine.control.execute("DEL", room)  # the next run may need another worker
        elif not self._makes_room:
            first = await engine.control.execute("SET", room, self._name, "NX", "PX", _MAKE_ROOM_MS)
            self._makes_room = first is not None

    def _start(
        self, name: str, work: Coroutine[Any, Any, None], job: Waiting | None = None, *, alone: bool = False
    ) -> None:
        self._is_alone = alone
        task = asyncio.get_running_loop().create_task(self._run_one(work), name=f"agx-job-{name}")
        self._tasks[task] = job
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task)
        if not self._tasks:
            self._is_alone = False
        self._wake.set()

    async def _run_one(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            # The stream and the log have how the run ended already; the worker continues with the next one.
            logger.debug("agx: a job ended with an exception", exc_info=True)

    async def _expire_calls(self, engine: Engine) -> None:
        """Deny the calls on which nobody has decided in time, and go on with runs whose calls are decided."""
        await engine.ready()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXPIRE_EVERY * random.uniform(0.5, 1.5)):
                    await self._wake_decided.wait()
            self._wake_decided.clear()
            with contextlib.suppress(AgxError):  # too many jobs wait: later
                await expire_calls(engine)

    async def _announce(self, engine: Engine) -> None:
        """Announce which agents are served, so that jobs of other agents can be ended and reported."""
        await engine.ready()
        key = keys.workers(engine.config.key_prefix)
        while True:
            # A worker without runs renews no lease, and after a pause of its machine only Redis knows the time.
            asked_ns = time.monotonic_ns()
            now = await read_clock(engine.control)
            engine.clock.sync(now, asked_ns)
            pairs = [part for agent in self.recipes for part in (now, agent)]
            added = engine.control.execute("ZADD", key, *pairs)
            await engine.control.execute("EXPIRE", key, keys.INDEX_TTL)  # in the same round trip
            await added
            self._announced_at = asyncio.get_running_loop().time()
            await asyncio.sleep(_SEEN_EVERY)
