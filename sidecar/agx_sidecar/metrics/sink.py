"""The metrics sink: one leader folds all facts and exports the fleet's series, the others stand by (contract, 7)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from redis.exceptions import ResponseError

from agx.facts.reader import QueueEntry, QueuePages
from agx.redis import keys
from agx.redis.entry_id import parse_id

from ..link import TROUBLE, Link
from ..source import Decode, QueueState, decode_fact, group_partitions, pause_between_reads, read_after, read_states
from . import instruments as i
from .fold import RECENT, ZERO_ID, Fold, Position
from .gauges import (
    Backlog,
    TracesTrims,
    count_approvals,
    count_jobs,
    count_live,
    measure_metrics,
    measure_traces,
    sample_gauges,
)
from .leader import Lease, StateGuard, StoodDownError
from .series import Sample, Series
from .state import NewerStateError, State, UnreadableStateError, dump, load, pack
from .table import Instrument

logger = logging.getLogger(__name__)

WRITE_PERIOD = 2.0  # seconds between two writes of the state
MEASURE_PERIOD = 2.0  # seconds between two measurements of leases and queues
APPROVALS_PERIOD = 10.0  # seconds between two counts of tool calls that wait for a decision, which takes longer
RETIRE_PERIOD = 60.0  # seconds
_NEWER_PAUSE = 10.0  # seconds before a newer state is read again


def leaf_of(error: BaseException) -> BaseException:
    """Return the first exception that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class CatchUp:
    """The entries that were in the queues when this replica took over and have not been read yet."""

    def __init__(self, ends: dict[int, str]) -> None:
        self.done = asyncio.Event()
        self._ends = ends
        if not ends:
            self.done.set()

    def reached(self, n: int, entry_id: str) -> None:
        """A partition has been read up to an entry."""
        if n in self._ends and parse_id(entry_id) >= parse_id(self._ends[n]):
            del self._ends[n]
            if not self._ends:
                self.done.set()


class MetricsSink:
    """Leads or stands by, until it is stopped."""

    def __init__(
        self, link: Link, prefix: str, lease_length: float, own: Series, *, decode: Decode = decode_fact
    ) -> None:
        self._link = link
        self._prefix = prefix
        self._own = own
        self._decode = decode
        self._lease = Lease(link, prefix, lease_length)
        self._guard = StateGuard(link, prefix, self._lease.owner)
        self._partitions = 0  # while `run()` runs
        self._state = State()
        self._fold: Fold | None = None  # while leading
        self._read_ids: dict[int, str] = {}  # up to which this replica has read the partitions, whenever it led
        self._caught_up = False
        self._by_scope: dict[Instrument, dict[str, int]] = {}  # live runs, waiting jobs
        self._backlogs: dict[tuple[int, str], Backlog] = {}
        self._unreadable: set[int] = set()  # partitions whose queue is no stream
        self._read_again: dict[int, str] = {}  # partitions that are read from their start again, and up to which entry

    @property
    def exporting(self) -> bool:
        """Whether this replica exports the fleet's series, right now."""
        return self._caught_up and self._lease.held

    @property
    def begun_ns(self) -> int:
        """When the fleet's counts began, by the server's clock: the same for every leader."""
        return self._state.begun_ms * 1_000_000

    def sample(self) -> dict[Instrument, list[Sample]]:
        """Copy the fleet's series, all of one moment; empty on a standby."""
        fold = self._fold
        if fold is None or not self.exporting:
            return {}
        for label, count in fold.series.take_overflows().items():
            self._own.counter(i.LABEL_OVERFLOW, label).add(count)
        gauges = sample_gauges(fold, self._state.traces_trims, self._by_scope, self._backlogs, self._link.now_ms())
        return {**fold.series.sample(), **gauges}

    async def run(self, partitions: int, stop: asyncio.Event) -> None:
        """Take part in the election until `stop`, then hand the state over."""
        self._partitions = partitions
        work = asyncio.create_task(self._take_part())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            work.cancel()
            await asyncio.wait({work})
            await self._leave()
        if not work.cancelled():
            await work

    async def _take_part(self) -> None:
        while True:
            await self._stand_by_and_lead()
            self._step_down()

    async def _stand_by_and_lead(self) -> None:
        while True:
            if await self._link.persist("take the leader's lease", self._lease.take):
                break
            await asyncio.sleep(self._lease.length / 5)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_lease())
                tasks.create_task(self._lead())
        except* StoodDownError as stood_down:
            logger.warning("no longer the leader: %s", leaf_of(stood_down))
        except* NewerStateError as newer:
            self._link.warnings.warn(f"not leading: the metric state is newer ({leaf_of(newer)}): update this one")
            await self._link.persist("release the lease", self._lease.release)
            await asyncio.sleep(_NEWER_PAUSE)

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self._lease.length / 5)
            await self._link.persist("renew the leader's lease", self._renew)

    async def _renew(self) -> None:
        asked = time.monotonic()
        if not await self._lease.renew():
            await self._guard.check()
            self._lease.confirm(asked)

    async def _lead(self) -> None:
        state = await self._link.persist("load the metric state", self._load_state)
        state.begun_ms = state.begun_ms or self._link.now_ms()
        for n in range(self._partitions):
            state.positions.setdefault(n, Position())
            state.traces_trims.setdefault(n, TracesTrims())
        fold = Fold(state.series, self._own, state.positions, read=self._read_ids, decode=self._decode)
        catch_up = await self._link.persist("find where the queues stand", lambda: self._find_ends(fold))
        await self._link.persist("read known facts", lambda: self._recall(fold))
        self._state, self._fold = state, fold
        self._read_again.clear()
        async with asyncio.TaskGroup() as tasks:
            for group in group_partitions(self._link, self._partitions):
                tasks.create_task(self._read(fold, group, catch_up))
            await catch_up.done.wait()
            self._caught_up = True
            logger.info("leading: exporting the fleet's metrics")
            tasks.create_task(self._every(WRITE_PERIOD, "write the metric state", self._writer(fold)))
            tasks.create_task(self._every(MEASURE_PERIOD, "measure the queues", lambda: self._measure(fold)))
            tasks.create_task(self._every(MEASURE_PERIOD, "count live runs and jobs", self._count))
            tasks.create_task(self._every(APPROVALS_PERIOD, "count calls that wait", self._count_approvals))
            tasks.create_task(self._retire(fold))

    async def _load_state(self) -> State:
        body = await self._guard.claim()
        if not body:
            return State()
        try:
            return await asyncio.to_thread(load, body)
        except UnreadableStateError as error:
            await self._guard.set_aside(body, error)
            return State()

    async def _find_ends(self, fold: Fold) -> CatchUp:
        states = await self._read_states(fold)
        ends = {n: state.last_entry for n, state in states.items() if state.last_entry is not None}
        catch_up = CatchUp(ends)
        for n in list(ends):
            catch_up.reached(n, fold.positions[n].last_id)
        return catch_up

    async def _recall(self, fold: Fold) -> None:
        """Read the keys of the last facts that were counted, newest first over all partitions, to recognise repeats."""
        pages = {
            n: QueuePages(
                self._link.call, keys.queue(self._prefix, n), start=fold.positions[n].last_id, newest_first=True
            )
            for n in range(self._partitions)
            if fold.positions[n].last_id != ZERO_ID and n not in self._unreadable
        }
        oldest = dict.fromkeys(pages, float("inf"))
        known: list[str] = []
        while pages and len(known) < RECENT:
            n = max(pages, key=lambda at: oldest[at])
            page = await anext(pages[n], None)
            if page is None:
                del pages[n]
                continue
            oldest[n] = parse_id(page[-1].id)[0]
            known += [key for entry in page if (key := entry.fact_key) is not None]
        for key in reversed(known):
            fold.known.add(key)

    async def _read(self, fold: Fold, partitions: range, catch_up: CatchUp) -> None:
        by_key = {keys.queue(self._prefix, n): n for n in partitions}
        places: dict[str, str] = {}

        async def read() -> dict[str, list[QueueEntry]]:
            nonlocal places
            places = {key: fold.positions[n].last_id for key, n in by_key.items() if n not in self._unreadable}
            return await read_after(self._link, places)

        while True:
            found = await self._link.persist("read facts", read)
            for key, entries in found.items():
                n = by_key[key]
                if fold.positions[n].last_id != places[key]:  # the queue began anew while we waited
                    continue
                fold.apply(n, entries)
                catch_up.reached(n, fold.positions[n].last_id)
                if n in self._read_again and parse_id(fold.positions[n].last_id) >= parse_id(self._read_again[n]):
                    del self._read_again[n]
                await asyncio.sleep(0)
            if found:
                await pause_between_reads(found)

    def _writer(self, fold: Fold) -> Callable[[], Awaitable[None]]:
        written = -1

        async def write() -> None:
            nonlocal written
            changes = fold.changes
            # The next leader would count again what is counted here and follows the position.
            if changes == written or self._read_again or not self._lease.held:
                return
            body = await asyncio.to_thread(pack, self._dump(fold))
            if self._lease.held:
                await self._guard.write(body)
                written = changes

        return write

    def _dump(self, fold: Fold) -> bytes:
        fold.touch()
        return dump(self._state)

    async def _measure(self, fold: Fold) -> None:
        read = {n: replace(position) for n, position in fold.positions.items()}
        states = await self._read_states(fold)
        for n in range(self._partitions):
            self._backlogs[n, "metrics"] = Backlog()
            if (n, "traces") in self._backlogs:
                self._backlogs[n, "traces"] = Backlog()
            if (state := states.get(n)) is None:
                self._read_again.pop(n, None)
                continue
            key, position = keys.queue(self._prefix, n), fold.positions[n]
            self._backlogs[n, "metrics"] = measure_metrics(self._link, key, position, read[n], state)
            if position.last_id == ZERO_ID != read[n].last_id and state.last_entry is not None:
                self._read_again[n] = state.last_entry
            traces = measure_traces(self._link, self._state.traces_trims[n], state)
            if traces is not None:
                self._backlogs[n, "traces"] = traces

    async def _read_states(self, fold: Fold) -> dict[int, QueueState]:
        """Return where the queues stand; a key that is no stream is not read as long as it is there."""
        numbers = range(self._partitions)
        read = {keys.queue(self._prefix, n): fold.positions[n].last_id for n in numbers}
        found = await read_states(self._link, read)
        states: dict[int, QueueState] = {}
        self._unreadable.clear()
        for n, (key, state) in zip(numbers, found.items(), strict=True):
            if isinstance(state, ResponseError):
                self._link.report_refusal(f"read {key}", state)
                self._unreadable.add(n)
            elif state is not None:
                states[n] = state
        return states

    async def _count(self) -> None:
        self._by_scope[i.RUNS_LIVE] = await count_live(self._link, self._prefix, self._partitions)
        self._by_scope[i.JOBS_WAITING] = await count_jobs(self._link, self._prefix, self._partitions)

    async def _count_approvals(self) -> None:
        self._by_scope[i.APPROVALS_PENDING] = await count_approvals(self._link, self._prefix, self._partitions)

    async def _retire(self, fold: Fold) -> None:
        while True:
            await asyncio.sleep(RETIRE_PERIOD)
            fold.forget_idle(self._link.now_ms() // 1000)

    async def _every(self, period: float, doing: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._link.persist(doing, work)
            await asyncio.sleep(period)

    async def _leave(self) -> None:
        """Write the state a last time and release the lease, if they are ours."""
        fold, led = self._fold, self._caught_up
        self._step_down()
        try:
            if fold is not None and led and self._lease.held:
                await self._guard.hand_over(pack(self._dump(fold)))
            await self._lease.release()
        except (*TROUBLE, StoodDownError) as error:
            logger.warning("the metric state could not be handed over (%s): a successor replays the queues", error)

    def _step_down(self) -> None:
        if self._fold is not None:
            known = self._read_ids
            for n, position in self._fold.positions.items():
                known[n] = max(known.get(n, ZERO_ID), position.last_id, key=parse_id)
        self._fold = None
        self._caught_up = False
        self._by_scope, self._backlogs = {}, {}
