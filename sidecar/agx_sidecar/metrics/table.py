"""What a row of the table of metrics consists of: labels, the facts it is fed from, and how its value is taken.

`instruments` has the rows, `fold` compiles them; nothing else has to know a metric by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agx.facts.schema import APPEND_BUCKETS, CHUNK_BUCKETS

Kind = Literal["counter", "gauge", "histogram"]
Value = Callable[[Any], int | None]  # takes the fact; None: there is nothing to observe
Counts = Callable[[Any], tuple[int, ...]]

NANO = 1_000_000_000

LABEL_CAP = 50
SERIES_BUDGET = 2_000
HISTOGRAM_BUDGET = 200

# Upper bounds, in ns, tokens or calls. Those of `gen_ai_*` come from the GenAI conventions; those of `agx_*` have steps
# of 2^(1/2), because a quantile is interpolated within its bucket.


def _ns(seconds: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(bound * NANO) for bound in seconds)


def _fine(first_s: float, last_s: float) -> tuple[int, ...]:
    steps = round(2 * math.log2(last_s / first_s))
    return _ns(tuple(first_s * 2 ** (k / 2) for k in range(steps + 1)))


OPERATION_BUCKETS = _ns(CHUNK_BUCKETS)  # 0.01 x 2^k up to 81.92 s
AGENT_BUCKETS = tuple(100_000_000 << k for k in range(13))  # 0.1 x 2^k up to 409.6 s
TOKEN_BUCKETS = tuple(4**k for k in range(14))  # 1 ... 67108864
CALL_BUCKETS = tuple(2**k for k in range(8))  # 1 ... 128
RUN_BUCKETS = _fine(0.1, 409.6)
FIRST_TOKEN_BUCKETS = _fine(0.025, 409.6)
NODE_BUCKETS = _fine(0.01, 81.92)
CANCEL_BUCKETS = _fine(0.005, 40.96)
APPEND_NS_BUCKETS = _ns(APPEND_BUCKETS)


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """One label, compared by identity.

    `paths` are attributes of the fact, such as `model.provider`. `derive` makes the label's value from theirs; without
    it there is one path, whose value is taken. A label set is derived once and then cached by the paths' values, so
    `derive` must depend on nothing else.
    `values` exist from the start: a series with each of them begins at zero as soon as the other labels are known.
    `closed`: it has no other values, so they neither fill a cap nor make a series idle.
    """

    name: str
    paths: tuple[str, ...] = ()
    derive: Callable[..., str] | None = None
    values: tuple[str, ...] = ()
    closed: bool = False
    cap: int = LABEL_CAP

    @property
    def is_part(self) -> bool:
        """Whether its values are the keys of the instrument's `value`, so one fact is observed under each."""
        return not self.paths and self.derive is None


@dataclass(frozen=True, slots=True)
class Source:
    """The facts that feed an instrument: of one class, where `part` is present and `where`'s path has such a value.

    `at_ns` is the attribute, of the part if there is one, with the time of an observation.
    """

    fact: type
    part: str | None = None
    where: tuple[str, tuple[str | bool, ...]] | None = None
    at_ns: str = "end_ns"


@dataclass(frozen=True, slots=True, eq=False)
class Instrument:
    """One metric, compared by identity. Its values are integers of `1 / scale` of the unit.

    `value` takes from a fact what it adds or observes: 1 where it is None. A mapping has one such function for each
    value of the label that `is_part`. `counts`: the fact has counts per bucket already, and `value` is their sum.
    `fleet`: only the leader exports it.
    """

    name: str
    kind: Kind
    by: tuple[Label, ...]
    help: str
    source: Source | None = None
    value: Value | Mapping[str, Value] | None = None
    counts: Counts | None = None
    scale: int = 1
    buckets: tuple[int, ...] = ()
    fleet: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its labels."""
        return tuple(label.name for label in self.by)

    @property
    def budget(self) -> int:
        """How many label sets it may have."""
        return HISTOGRAM_BUDGET if self.kind == "histogram" else SERIES_BUDGET

    @property
    def has_exemplars(self) -> bool:
        """Whether an observation links to its trace: durations do."""
        return self.kind == "histogram" and self.scale == NANO and self.counts is None


def counter(
    name: str,
    by: tuple[Label, ...],
    text: str,
    *,
    source: Source | None = None,
    value: Value | Mapping[str, Value] | None = None,
    scale: int = 1,
) -> Instrument:
    """Return the row of a counter of the fleet."""
    return Instrument(name, "counter", by, text, source, value, scale=scale)


def gauge(name: str, by: tuple[Label, ...], text: str, scale: int = 1) -> Instrument:
    """Return the row of a gauge of the fleet: measured, not fed from facts."""
    return Instrument(name, "gauge", by, text, scale=scale)


def histogram(
    name: str,
    by: tuple[Label, ...],
    text: str,
    *,
    buckets: tuple[int, ...],
    source: Source,
    value: Value | Mapping[str, Value],
    counts: Counts | None = None,
    scale: int = NANO,
) -> Instrument:
    """Return the row of a histogram of the fleet."""
    return Instrument(name, "histogram", by, text, source, value, counts, scale, buckets)


def own(name: str, by: tuple[Label, ...], text: str, scale: int = 1) -> Instrument:
    """Return the row of a metric that each replica has about itself."""
    kind: Kind = "counter" if name.endswith("_total") else "gauge"
    return Instrument(name, kind, by, text, scale=scale, fleet=False)
