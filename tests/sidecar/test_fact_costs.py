"""What a fact costs the sidecar, in calls of functions: they do not depend on the machine."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

from support.made_facts import call, ended, node, started, tool

from agx.facts.reader import QueueEntry
from agx.facts.schema import Fact, encode
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Series
from agx_sidecar.traces.encoding import encode_request
from agx_sidecar.traces.spans import spans_of


class Calls(Counter[str]):
    """Counts the calls of Python functions in a block."""

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, what: str, argument: object) -> None:
        if what == "call":
            self[frame.f_code.co_qualname] += 1


def some_facts(first: int, runs: int) -> list[Fact]:
    """A start, two model requests, a tool call and an end for each run."""
    made: list[Fact] = []
    for run_id in (f"run-{n}" for n in range(first, first + runs)):
        requests = [node(run_id, idx, model=call()) for idx in range(2)]
        made += [started(run_id), *requests, tool(run_id), ended(run_id)]
    return made


def entries(facts: list[Fact], first: int) -> list[QueueEntry]:
    return [QueueEntry(f"1700000000000-{first + n}", encode(fact)) for n, fact in enumerate(facts)]


def test_calls_of_a_fact_that_is_counted() -> None:
    fold = Fold(Series(), Series(), {0: Position()})
    fold.apply(0, entries(some_facts(0, 10), 0))
    again = entries(some_facts(10, 20), 100)
    with Calls() as calls:
        fold.apply(0, again)
    assert calls.total() / len(again) <= 18, calls


def test_calls_of_a_span() -> None:
    facts = some_facts(0, 20)
    encode_request([span for fact in facts for span in spans_of(fact)])
    with Calls() as calls:
        spans = [span for fact in facts for span in spans_of(fact)]
    assert len(spans) == 20 * 5
    assert calls.total() / len(spans) <= 21, calls
    with Calls() as calls:
        encode_request(spans)
    assert calls.total() / len(spans) <= 45, calls
