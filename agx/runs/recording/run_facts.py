"""The facts of one run: their common fields, the unique names of its nodes and tool calls, and how they are emitted."""

from __future__ import annotations

from typing import TypedDict

from ...facts.queues import Queues
from ...facts.schema import Fact, Service, Trace
from ..state import RunState


class CommonFields(TypedDict):
    """The fields that have one value in all facts of a run."""

    scope: str
    user: str | None
    session: str | None
    run_id: str
    parent_run_id: str | None
    agent: str
    service: Service


class RunFields(CommonFields):
    """The fields that every fact of a run has."""

    id: str
    trace: Trace


class RunFacts:
    """Names the steps of a run and emits its facts."""

    def __init__(self, queues: Queues, state: RunState, common: CommonFields) -> None:
        self._queues = queues
        self._state = state
        self._common = common
        self._names: set[str] = set()  # of nodes and tool calls, emitted or under way

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add_name(self, name: str) -> str:
        """Make the name of a node or tool call unique: a model may give two calls one id."""
        while name in self._names:
            name += "+"
        self._names.add(name)
        return name

    def describe(self, name: str, place: Trace) -> RunFields:
        """Return the run's fields for a fact with this name."""
        return {**self._common, "id": f"{self._common['run_id']}:{name}", "trace": place}

    def emit(self, fact: Fact) -> None:
        """Hand a fact over, unless another process emits how this run ended."""
        if not self._state.suppressed:
            self._queues.put(fact, self._state)
