"""Finds runs whose process died and that this process can resume: by their deadlines, then by the live key itself."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Container
from dataclasses import dataclass

from redis.exceptions import ResponseError

from ..engine.engine import Engine
from ..recovery.dead_run import DeadRun, read_dead_run
from ..redis import keys
from ..redis.live_key import parse_live

logger = logging.getLogger("agx")

_AT_ONCE = 100  # runs past their deadline that one look takes from a partition
_LOOKS = 8  # runs that are read at the same time: each takes some round trips
_LOOK_AGAIN = 30.0  # seconds before a run that was left alone is read again, unless its deadline has changed


@dataclass(frozen=True, slots=True)
class _Death:
    """A deadline that has passed. It identifies an attempt: the next process that holds the run sets a later one."""

    member: bytes
    deadline_ms: float


@dataclass(frozen=True, slots=True)
class _Passed:
    """A run that was read and left alone.

    Args:
        until: the loop's time at which it is read again.
        alone: id of the run where it waits for a worker without other runs; None where it is not for this process.
    """

    until: float
    alone: str | None = None


class DeadRuns:
    """Looks for dead runs of some agents that may be tried again.

    A look costs one command per partition, and one for each run that another process may hold. A stream is read only if
    its run could start here, and read again after 30 s or once its deadline has changed.

    Args:
        agents: names of this worker's recipes.
        known: lease members of runs that this process has already.
        takes: whether a run could be started now; its argument is whether the run has to run alone.
    """

    def __init__(
        self, engine: Engine, agents: Container[str], *, known: Container[str], takes: Callable[[bool], bool]
    ) -> None:
        self.waiting: set[str] = set()  # ids of runs that wait for a worker without other runs, as of the last look
        self._engine = engine
        self._agents = agents
        self._known = known
        self._takes = takes
        self._passed: dict[_Death, _Passed] = {}
        self._offsets: dict[int, int] = {}  # by partition: where the next look begins

    async def find(self) -> AsyncIterator[DeadRun]:
        """Look once, and yield the dead runs that this process can start now.

        Raises:
            RedisError, OSError: Redis did not answer.
        """
        deaths = [] if self._engine.is_ending else await self._read_deaths()
        now = asyncio.get_running_loop().time()
        self._passed = {
            death: passed for death in deaths if (passed := self._passed.get(death)) is not None and passed.until > now
        }
        self.waiting = {passed.alone for passed in self._passed.values() if passed.alone is not None}
        random.shuffle(deaths)  # workers that look at the same time begin with different runs
        for start in range(0, len(deaths), _LOOKS):
            some = [death for death in deaths[start : start + _LOOKS] if self._may_look(death)]
            for dead in await asyncio.gather(*(self._try_look(death, now + _LOOK_AGAIN) for death in some)):
                if dead is not None and self._takes(dead.must_run_alone):
                    self.waiting.discard(dead.run_id)
                    yield dead

    def _may_look(self, death: _Death) -> bool:
        passed = self._passed.get(death)
        if passed is not None and (passed.alone is None or not self._takes(True)):
            return False
        return not self._engine.is_ending and (self._takes(False) or self._takes(True))

    async def _try_look(self, death: _Death, look_again: float) -> DeadRun | None:
        try:
            return await self._look(death, look_again)
        except ResponseError as error:
            # What another client wrote under the session's keys must not hide the other runs.
            logger.warning("agx: a dead run can't be read (%s)", error)
            self._pass(death, look_again)
            return None

    async def _read_deaths(self) -> list[_Death]:
        engine, now_ms = self._engine, self._engine.clock.now_ms()
        partitions = range(engine.queues.partitions or 1)
        pages = await asyncio.gather(
            *(
                engine.control.execute(
                    "ZRANGEBYSCORE", keys.leases(engine.config.key_prefix, n), "-inf", now_ms,
                    "WITHSCORES", "LIMIT", self._offsets.get(n, 0), _AT_ONCE,
                )
                for n in partitions
            )
        )  # fmt: skip
        deaths = []
        for n, page in zip(partitions, pages, strict=True):
            found = [_Death(member, float(score)) for member, score in zip(page[::2], page[1::2], strict=True)]
            # Runs that only others can resume must not hide the rest.
            self._offsets[n] = self._offsets.get(n, 0) + _AT_ONCE if len(found) == _AT_ONCE else 0
            deaths += found
        return deaths

    async def _look(self, death: _Death, look_again: float) -> DeadRun | None:
        """Return a run that can be started now; None where it is held, or left alone."""
        engine = self._engine
        try:
            session, run_id = keys.parse_lease_member(engine.config.key_prefix, death.member.decode())
        except ValueError:
            self._pass(death, look_again)  # not ours; the sidecar removes it
            return None
        if session.lease_member(run_id) in self._known or session.stream in engine.sessions:
            return None
        if _is_held(await engine.control.execute("GET", session.live), run_id):
            return None  # the deadline is only a hint
        dead = await read_dead_run(engine.control, session, run_id, self._agents, deadline_ms=death.deadline_ms)
        if dead is None or dead.exhausted:
            self._pass(death, look_again)
            return None
        if dead.must_run_alone and not self._takes(True):
            self.waiting.add(run_id)
            self._pass(death, look_again, run_id)
            return None
        return dead if self._takes(dead.must_run_alone) else None

    def _pass(self, death: _Death, until: float, alone: str | None = None) -> None:
        self._passed[death] = _Passed(until, alone)


def _is_held(held: bytes | None, run_id: str) -> bool:
    """Return whether a process has the session; a cancel that came after the run's process died does not count."""
    if held is None:
        return False
    value = parse_live(held)
    return not (value.is_gap_mark and value.run_id == run_id)
