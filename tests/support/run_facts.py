"""The facts of one run, read from the scope queues, and what must hold of them however often the run was resumed."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from redis.asyncio import Redis

from agx.engine.registry import current_engine
from agx.facts.reader import QueueEntry, QueuePages
from agx.facts.schema import NodeEnded, RunEnded, RunFact, RunResumed, RunStarted, ToolEnded
from agx.redis import keys
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Counter as CounterCell
from agx_sidecar.metrics.series import Series
from agx_sidecar.metrics.table import Instrument
from agx_sidecar.traces.spans import spans_of

from .waiting import wait_until

T = TypeVar("T", bound=RunFact)


class FactsOfRun:
    """All facts of a run that has ended."""

    def __init__(self, entries: list[QueueEntry]) -> None:
        self._entries = entries
        self.facts = [fact for entry in entries if isinstance(fact := entry.fact, RunFact)]

    @classmethod
    async def read(cls, client: Redis, run_id: str) -> FactsOfRun:
        """Return the facts of a run, once the fact of its end is queued."""

        async def look() -> FactsOfRun | None:
            found: list[QueueEntry] = []
            for n in range(current_engine().queues.partitions or 1):
                async for page in QueuePages(client.execute_command, keys.queue("agx", n)):
                    found += [entry for entry in page if run_id.encode() in entry.payload]
            run = cls(found)
            return run if run.of(RunEnded) else None

        return await wait_until(look)

    def of(self, kind: type[T]) -> list[T]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

    @property
    def requests(self) -> list[NodeEnded]:
        return [node for node in self.of(NodeEnded) if node.model is not None]

    def count(self, instrument: Instrument) -> int:
        """Return what the sidecar's counter has after these facts, over all labels."""
        fold = Fold(Series(), Series(), {0: Position()})
        fold.apply(0, sorted(self._entries, key=lambda entry: entry.id))
        cells = fold.series.cells.get(instrument, {}).values()
        return sum(cell.value for cell in cells if isinstance(cell, CounterCell))

    def check(self, *, attempts: int) -> None:
        """Check what holds of each run: it counts once, and each step has one fact and one span, in one trace."""
        (started,), (ended,) = self.of(RunStarted), self.of(RunEnded)
        assert [fact.attempt for fact in self.of(RunResumed)] == list(range(2, attempts + 1))
        assert all(fact.at_ns >= fact.last_ns >= started.start_ns // 10**9 * 10**9 for fact in self.of(RunResumed))
        assert self.count(i.RUNS_STARTED) == self.count(i.RUNS) == 1
        assert self.count(i.RESUMES) == attempts - 1
        steps = [fact.id for fact in [*self.requests, *self.of(ToolEnded)]]
        assert max(Counter(steps).values()) == 1
        assert ended.model_calls == len(self.requests)
        assert ended.tool_calls == len(self.of(ToolEnded))
        assert ended.start_ns <= min(fact.start_ns for fact in self.requests)
        spans = [span for fact in self.facts for span in spans_of(fact)]
        contexts = [span.context for span in spans]
        assert None not in contexts
        assert len({context.span_id for context in contexts}) == len(spans)
        assert {context.trace_id for context in contexts} == {int(started.trace.trace_id, 16)}
        ids = {context.span_id for context in contexts}
        assert all(span.parent is None or span.parent.span_id in ids for span in spans)
