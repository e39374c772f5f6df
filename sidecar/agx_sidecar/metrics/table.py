"""What a row of the table of metrics consists of: labels, the facts it is fed from, and how its value is taken.

`instruments` has the rows, `fold` compiles them; nothing else has to know a metric by its name. The types come first,
then all labels, then the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from agx.facts import schema as facts
from agx.telemetry.conventions import CHAT

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


OPERATION_BUCKETS = _ns(facts.CHUNK_BUCKETS)  # 0.01 x 2^k up to 81.92 s
AGENT_BUCKETS = tuple(100_000_000 << k for k in range(13))  # 0.1 x 2^k up to 409.6 s
TOKEN_BUCKETS = tuple(4**k for k in range(14))  # 1 ... 67108864
CALL_BUCKETS = tuple(2**k for k in range(8))  # 1 ... 128
RUN_BUCKETS = _fine(0.1, 409.6)
FIRST_TOKEN_BUCKETS = _fine(0.025, 409.6)
APPROVAL_BUCKETS = _fine(1.0, 1_048_576.0)  # up to twelve days
NODE_BUCKETS = _fine(0.01, 81.92)
CANCEL_BUCKETS = _fine(0.005, 40.96)
COST_BUCKETS = tuple(10_000 << k for k in range(0, 23, 2))  # $0.00001 x 4^k up to $41.9
SCORE_BUCKETS = _ns((0, 0.25, 0.5, 0.75, 1, 2, 3, 4, 5, 10, 25, 50, 75, 100))
APPEND_NS_BUCKETS = _ns(facts.APPEND_BUCKETS)


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
    `fleet`: only the leader exports it. `otel_name`: its name in the GenAI conventions, empty for our own metrics.
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
    otel_name: str = ""

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
    otel_name: str = "",
) -> Instrument:
    """Return the row of a counter of the fleet."""
    return Instrument(name, "counter", by, text, source, value, scale=scale, otel_name=otel_name)


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
    otel_name: str = "",
) -> Instrument:
    """Return the row of a histogram of the fleet."""
    return Instrument(name, "histogram", by, text, source, value, counts, scale, buckets, otel_name=otel_name)


def own(name: str, by: tuple[Label, ...], text: str, scale: int = 1) -> Instrument:
    """Return the row of a metric that each replica has about itself."""
    kind: Kind = "counter" if name.endswith("_total") else "gauge"
    return Instrument(name, kind, by, text, scale=scale, fleet=False)


OTHER = "__other__"  # the value of a label past its cap, or of the widest label past its metric's budget
UNKNOWN_TOOL = "__unknown__"  # the value of a tool that the agent does not have: the model invented its name
NO_STAGE = "none"  # cancelled before the first node
OTHER_ERROR = "_OTHER"  # the conventions' word for an error without a type
SERIES_IDLE = 86_400  # seconds without an observation after which a series may be retired
WIDE_CAP = 100  # of the labels whose values are the users' own names

OUTCOMES: tuple[str, ...] = get_args(facts.Outcome)
REASONS: tuple[str, ...] = get_args(facts.Reason)
STAGES: tuple[str, ...] = get_args(facts.NodeKind)
TOOL_OUTCOMES: tuple[str, ...] = get_args(facts.ToolOutcome)
USAGE_SOURCES: tuple[str, ...] = get_args(facts.UsageSource)
TOKEN_TYPES = ("input", "output", "cache_read", "cache_write", "reasoning")


# Labels.


def _error(outcome: str, error_type: str | None) -> str:
    return error_type or OTHER_ERROR if outcome in facts.ERROR_OUTCOMES else ""


def _request_error(outcome: str, error_type: str | None, of_request: str | None) -> str:
    return _error(outcome, of_request or error_type)


def _tool(name: str, known: bool) -> str:
    return name if known else UNKNOWN_TOOL


def _tool_error(outcome: str, error_type: str | None) -> str:
    if outcome == "retry":
        return error_type or ""
    return error_type or OTHER_ERROR if outcome == "error" else ""


def _closed(name: str, *paths: str, values: tuple[str, ...] = ()) -> Label:
    return Label(name, paths, values=values, closed=True)


SCOPE = Label("scope", ("scope",), cap=WIDE_CAP)
AGENT = Label("agent", ("agent",), cap=WIDE_CAP)
AGENT_NAME = Label("gen_ai_agent_name", ("agent",), cap=WIDE_CAP)
SERVICE = Label("service", ("service.name",))
SERVICE_NAME = Label("service_name", ("service.name",))  # what other people's boards call it
OUTCOME = _closed("outcome", "outcome", values=OUTCOMES)
ERROR_TYPE = Label("error_type", ("outcome", "error_type"), _error, values=("",))
ERROR_NAME = Label("error_type", ("outcome", "error_type"), _error, values=(OTHER_ERROR,))
REQUEST_ERROR = Label("error_type", ("outcome", "error_type", "model.error_type"), _request_error, values=("",))
STAGE = Label("stage", ("stage",), lambda stage: stage or NO_STAGE, values=STAGES, closed=True)
REASON = Label("reason", ("reason",), lambda reason: reason or "cancel", values=REASONS, closed=True)
NODE_KIND = _closed("kind", "node", values=STAGES)
OPERATION = Label("gen_ai_operation_name", (), lambda: CHAT, values=(CHAT,), closed=True)
PROVIDER = Label("gen_ai_provider_name", ("model.provider",))
REQUEST_MODEL = Label("gen_ai_request_model", ("model.request_model",), cap=WIDE_CAP)
RESPONSE_MODEL = Label("gen_ai_response_model", ("model.response_model",), lambda model: model or "", cap=WIDE_CAP)
MODALITY = Label("gen_ai_token_modality", (), lambda: "unknown", values=("unknown",), closed=True)
MODEL = Label("model", ("model.request_model",), cap=WIDE_CAP)
TOKEN_TYPE = _closed("type", values=TOKEN_TYPES)
WHOLE_TOKEN_TYPE = _closed("gen_ai_token_type", values=("input", "output"))
USAGE_SOURCE = _closed("source", "model.usage.source", values=USAGE_SOURCES)
TOOL = Label("tool", ("tool", "known"), _tool, cap=WIDE_CAP)
TOOL_NAME = Label("gen_ai_tool_name", ("tool", "known"), _tool, cap=WIDE_CAP)
TOOL_OUTCOME = _closed("outcome", "outcome", values=TOOL_OUTCOMES)
SCORE_NAME = Label("name", ("name",))
SCORED_MODEL = Label("model", ("model",), cap=WIDE_CAP)
DECISION = _closed("decision", "decision", values=get_args(facts.DecisionKind))
STEER_OUTCOME = _closed("outcome", "outcome", values=get_args(facts.SteerOutcome))
TOOL_ERROR = Label("error_type", ("outcome", "error_type"), _tool_error, values=("",))
# Of gauges and of a replica's own metrics, which no fact feeds.
PARTITION = Label("partition")
SINK = _closed("sink")
FACT_KIND = _closed(
    "kind",
    values=(
        "run.start",
        "run.resume",
        "run.steer",
        "run.feedback",
        "approval",
        "node",
        "tool",
        "run.end",
        "process",
        "repeat",
        "unknown",
    ),
)
LABEL = Label("label", values=("scope", "agent", "model", "tool"))
VERSION = Label("version")

REQUEST_LABELS = (OPERATION, PROVIDER, REQUEST_MODEL)
REQUEST_ORIGIN = (AGENT_NAME, RESPONSE_MODEL, SERVICE_NAME)


# The facts that feed the rows.

RUN_STARTED = Source(facts.RunStarted, at_ns="start_ns")
RUN_RESUMED = Source(facts.RunResumed, at_ns="at_ns")
APPROVAL = Source(facts.ApprovalDecided)
RUN_STEERED = Source(facts.RunSteered, at_ns="at_ns")
RUN_SCORED = Source(facts.RunFeedback, at_ns="at_ns")
RUN_ENDED = Source(facts.RunEnded)
RUN_FAILED = Source(facts.RunEnded, where=("outcome", facts.ERROR_OUTCOMES))
RUN_CANCELLED = Source(facts.RunEnded, where=("outcome", ("cancelled",)))
RUN_EXHAUSTED = Source(facts.RunEnded, where=("attempts_exhausted", (True,)))
RUN_STREAM = Source(facts.RunEnded, part="stream")
NODE = Source(facts.NodeEnded)
REQUEST = Source(facts.NodeEnded, part="model")
USAGE_KNOWN = Source(facts.NodeEnded, part="model", where=("model.usage.source", ("reported", "estimated")))
TOOL_CALL = Source(facts.ToolEnded)
PROCESS = Source(facts.ProcessState)
