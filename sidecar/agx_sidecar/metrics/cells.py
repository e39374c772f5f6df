"""Finds the cells that a kind of fact adds to, once per label set: the hot path has one look-up per fact, not ten.

On the first fact of an agent, model or tool its series are born at zero, so that `increase()` sees their first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from . import instruments as i
from .births import bear_agent, bear_model, bear_tool
from .series import Counter, Histogram, Series

Model = tuple[str, str, str]  # operation, provider, model
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunCells:
    """What the end of a run adds to, but for its cancellation."""

    runs: Counter
    duration: Histogram
    invoke: Histogram
    inference_calls: Histogram
    tool_calls: Histogram
    errors: Counter | None
    events: Counter
    bytes: Counter
    retries: Counter
    failures: Counter


@dataclass(frozen=True, slots=True)
class CallCells:
    """What every model request adds to."""

    duration: Histogram
    usage: Counter


@dataclass(frozen=True, slots=True)
class TokenCells:
    """What a model request with usage adds to; `tokens` in the order of TOKEN_TYPES."""

    input: Histogram
    output: Histogram
    tokens: tuple[Counter, ...]


@dataclass(frozen=True, slots=True)
class ToolCells:
    """What a tool call adds to."""

    calls: Counter
    duration: Histogram


class Cells:
    """Cells by label set. Those that count under `__other__` are not kept: their names would never end."""

    def __init__(self, series: Series) -> None:
        self._series = series
        self._known: dict[tuple[object, ...], object] = {}

    def forget(self) -> None:
        """Series have been retired: find them anew."""
        self._known.clear()

    def of_start(self, scope: str, agent: str, now: int) -> Counter:
        def find() -> Counter:
            bear_agent(self._series, scope, agent, now)
            return self._series.counter(i.RUNS_STARTED, (scope, agent), now)

        return self._once(("start", scope, agent), find)

    def of_end(self, scope: str, agent: str, outcome: str, error: str, now: int) -> RunCells:
        def find() -> RunCells:
            series, invoked = self._series, (agent, error)
            bear_agent(series, scope, agent, now)
            return RunCells(
                runs=series.counter(i.RUNS, (scope, agent, outcome), now),
                duration=series.histogram(i.RUN_DURATION, (agent, outcome), now),
                invoke=series.histogram(i.INVOKE_DURATION, invoked, now),
                inference_calls=series.histogram(i.INFERENCE_CALLS, invoked, now),
                tool_calls=series.histogram(i.TOOL_CALLS_PER_RUN, invoked, now),
                errors=series.counter(i.RUN_ERRORS, invoked, now) if error else None,
                events=series.counter(i.STREAM_EVENTS, (scope,), now),
                bytes=series.counter(i.STREAM_BYTES, (scope,), now),
                retries=series.counter(i.STREAM_RETRIES, (scope,), now),
                failures=series.counter(i.STREAM_FAILURES, (scope,), now),
            )

        return self._once(("end", scope, agent, outcome, error), find)

    def of_node(self, agent: str, kind: str, outcome: str, now: int) -> Histogram:
        def find() -> Histogram:
            return self._series.histogram(i.NODE_DURATION, (agent, kind, outcome), now)

        return self._once(("node", agent, kind, outcome), find)

    def of_call(self, model: Model, error: str, source: str, now: int) -> CallCells:
        def find() -> CallCells:
            return CallCells(
                duration=self._series.histogram(i.OPERATION_DURATION, (*model, error), now),
                usage=self._series.counter(i.USAGE, (source,), now),
            )

        return self._once(("call", model, error, source), find)

    def of_chunks(self, model: Model, now: int) -> tuple[Histogram, Histogram]:
        """Return the first chunk's cell and the other chunks'."""

        def find() -> tuple[Histogram, Histogram]:
            return (
                self._series.histogram(i.FIRST_CHUNK, model, now),
                self._series.histogram(i.OUTPUT_CHUNK, model, now),
            )

        return self._once(("chunks", model), find)

    def of_tokens(self, scope: str, agent: str, model: Model, now: int) -> TokenCells:
        def find() -> TokenCells:
            series, name = self._series, model[2]
            bear_model(series, scope, agent, model, now)
            return TokenCells(
                input=series.histogram(i.TOKEN_USAGE, (*model, "input"), now),
                output=series.histogram(i.TOKEN_USAGE, (*model, "output"), now),
                tokens=tuple(series.counter(i.TOKENS, (scope, agent, name, kind), now) for kind in i.TOKEN_TYPES),
            )

        return self._once(("tokens", scope, agent, model), find)

    def of_cost(self, scope: str, agent: str, model: str, now: int) -> Counter:
        def find() -> Counter:
            return self._series.counter(i.COST, (scope, agent, model), now)

        return self._once(("cost", scope, agent, model), find)

    def of_tool(self, agent: str, tool: str, outcome: str, error: str, now: int) -> ToolCells:
        def find() -> ToolCells:
            bear_tool(self._series, agent, tool, now)
            return ToolCells(
                calls=self._series.counter(i.TOOL_CALLS, (agent, tool, outcome), now),
                duration=self._series.histogram(i.TOOL_DURATION, (tool, error), now),
            )

        return self._once(("tool", agent, tool, outcome, error), find)

    def _once(self, key: tuple[object, ...], find: Callable[[], T]) -> T:
        known = self._known.get(key)
        if known is not None:
            return known  # type: ignore[return-value]  # a key's first part says what it holds
        diverted = self._series.diverted
        cells = find()
        if self._series.diverted == diverted:
            self._known[key] = cells
        return cells
