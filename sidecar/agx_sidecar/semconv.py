"""Shows GenAI metrics under the names that AGX_SEMCONV asks for. In: the fleet's series. Out: the series of an export.

Each observation is counted once, in the metrics of `instruments`. `next` and `both` show the same cells under more
names (`agx.telemetry.conventions`), so that old and new names have equal values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from agx.telemetry import conventions as c

from .metrics import instruments as i
from .metrics import table as t
from .metrics.exposition import Snapshot
from .metrics.series import Sample
from .metrics.table import Instrument, Kind, Label


@dataclass(frozen=True, slots=True)
class Name:
    """Cells of `source` as a metric `target`: those of one token type, if `token_type` is given.

    `given` has the values of labels of the target that the source does not have; others are empty.
    """

    source: Instrument
    target: Instrument
    token_type: str = ""
    given: Mapping[Label, str] = field(default_factory=dict)


def _name(source: Instrument, otel_name: str, *, kind: Kind = "histogram", token_type: str = "") -> Name:
    unit = "_seconds" if source.name.endswith("_seconds") else ""
    by = tuple(label for label in source.by if label is not t.WHOLE_TOKEN_TYPE)
    given = {}
    if kind == "counter" and token_type:
        by, given = (*by[:3], t.MODALITY, *by[3:]), {t.MODALITY: "unknown"}
    target = replace(
        source,
        name=otel_name.replace(".", "_") + ("_total" if kind == "counter" else unit),
        kind=kind,
        by=by,
        buckets=source.buckets if kind == "histogram" else (),
        otel_name=otel_name,
    )
    return Name(source, target, token_type, given)


RELEASED = (  # the names of `next`
    _name(i.OPERATION_DURATION, c.OPERATION_DURATION[1]),
    _name(i.FIRST_CHUNK, c.FIRST_CHUNK[1]),
    _name(i.OUTPUT_CHUNK, c.OUTPUT_CHUNK[1]),
    *(
        name
        for kind in t.WHOLE_TOKEN_TYPE.values
        for name in (
            _name(i.TOKEN_USAGE, c.USAGE_COUNTER.format(kind), kind="counter", token_type=kind),
            _name(i.TOKEN_USAGE, c.USAGE_PER_OPERATION.format(kind), token_type=kind),
        )
    ),
)
_OPERATIONS = replace(i.OPERATION_DURATION, by=(*i.OPERATION_DURATION.by, t.TOOL_NAME))
PUBLIC = (  # names that public boards use; the conventions up to 1.41 count a tool call as an operation
    Name(i.OPERATION_DURATION, _OPERATIONS),
    Name(i.TOOL_DURATION, _OPERATIONS, given={t.OPERATION: c.EXECUTE_TOOL}),
    *(_name(i.FIRST_CHUNK, otel_name) for otel_name in c.FIRST_TOKEN),
    _name(i.REQUEST_COST, c.COST_TOTAL, kind="counter"),
)
_REPLACED = frozenset(each.source for each in RELEASED)
_ADDED = frozenset({i.CACHE_READ, i.CACHE_WRITE, i.REASONING})
HIDDEN: Mapping[c.Semconv, frozenset[Instrument]] = {
    "current": _ADDED | {i.REQUEST_COST},
    "both": frozenset({i.OPERATION_DURATION}),  # wider there
    "next": _REPLACED | {i.REQUEST_COST},
}
SHOWN: Mapping[c.Semconv, Sequence[Name]] = {"current": (), "both": (*RELEASED, *PUBLIC), "next": RELEASED}


def named(snapshot: Snapshot, semconv: c.Semconv) -> Snapshot:
    """Return the series of an export."""
    shown = {each: cells for each, cells in snapshot.items() if each not in HIDDEN[semconv]}
    for name in SHOWN[semconv]:
        if name.source in snapshot:
            shown[name.target] = [*shown.get(name.target, ()), *_cells(name, snapshot[name.source])]
    return shown


def _cells(name: Name, cells: Sequence[Sample]) -> list[Sample]:
    source, target = name.source.by, name.target.by
    at = [source.index(label) if label in source else -1 for label in target]
    given = tuple(name.given.get(label, "") for label in target)
    token_type = source.index(t.WHOLE_TOKEN_TYPE) if name.token_type else 0
    is_counter = name.target.kind == "counter"
    return [
        Sample(
            tuple(cell.labels[n] if n >= 0 else value for n, value in zip(at, given, strict=True)),
            cell.value,
            () if is_counter else cell.counts,
            None if is_counter else cell.exemplars,
        )
        for cell in cells
        if not name.token_type or cell.labels[token_type] == name.token_type
    ]
