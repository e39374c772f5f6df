"""What really happened, as integers per series: docs/metrics.md in the plainest words, apart from the sidecar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from itertools import pairwise

import genai_prices

from agx.facts.schema import (
    ApprovalDecided,
    Fact,
    ModelCall,
    NodeEnded,
    ProcessState,
    RunEnded,
    RunFeedback,
    RunResumed,
    RunStarted,
    RunSteered,
    ToolEnded,
)
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics.table import NANO, Instrument

Series = tuple[str, frozenset[tuple[str, str]]]  # its name, and its labels that are not empty

_INFINITE = float("inf")


def series_of(name: str, labels: dict[str, str]) -> Series:
    """Return how a series is known here; a bucket's bound is a number, however it was written."""
    shown = {label: str(float(value)) if label == "le" else value for label, value in labels.items()}
    return name, frozenset((label, value) for label, value in shown.items() if value)


class Ledger:
    """Takes every fact once, and has the truth of every series in 1 / scale of its unit."""

    def __init__(self) -> None:
        self.truth: Counter[Series] = Counter()
        self.below_zero: Counter[str] = Counter()  # observations of a metric that were, and count as 0
        self._noted: set[str] = set()

    def total(self, name: str) -> int:
        """Return the sum over all series of a name."""
        return sum(value for (known, _), value in self.truth.items() if known == name)

    def note(self, fact: Fact) -> None:
        """Count a fact, unless it has been."""
        if fact.id in self._noted:
            return
        self._noted.add(fact.id)
        match fact:
            case RunStarted():
                self._add(i.RUNS_STARTED, 1, fact.scope, fact.agent, fact.service.name)
                if fact.waited_ns is not None:
                    self._observe(i.JOB_WAIT, fact.waited_ns, fact.agent)
            case RunResumed():
                self._add(i.RESUMES, 1, fact.agent)
                self._observe(i.RECOVERY, fact.at_ns - fact.last_ns, fact.agent)
            case RunSteered():
                self._add(i.STEERS, 1, fact.agent, fact.outcome)
            case RunFeedback():
                self._add(i.FEEDBACK, 1, fact.agent, fact.name, fact.model)
                self._observe(i.SCORE, round(fact.value * 10**9), fact.agent, fact.name, fact.model)
            case ApprovalDecided():
                self._add(i.APPROVALS, 1, fact.agent, fact.decision)
                self._observe(i.APPROVAL_WAIT, fact.end_ns - fact.start_ns, fact.agent)
            case RunEnded():
                self._note_end(fact)
            case NodeEnded():
                self._note_node(fact)
            case ToolEnded():
                self._note_tool(fact)
            case ProcessState():
                self._note_heartbeat(fact)

    def _note_end(self, run: RunEnded) -> None:
        error = (run.error_type or "_OTHER") if run.outcome in ("failed", "lost") else ""
        duration, service = run.end_ns - run.start_ns, run.service.name
        self._add(i.RUNS, 1, run.scope, run.agent, run.outcome, service)
        self._add(i.PLAIN_RUNS, run.plain_runs, run.agent)
        self._observe(i.RUN_DURATION, duration, run.agent, run.outcome, service)
        if run.first_text_ns is not None:
            self._observe(i.FIRST_TOKEN, run.first_text_ns, run.agent)
        self._observe(i.INVOKE_DURATION, duration, run.agent, error)
        self._observe(i.INFERENCE_CALLS, run.model_calls, run.agent, error)
        self._observe(i.TOOL_CALLS_PER_RUN, run.tool_calls, run.agent, error)
        if error:
            self._add(i.RUN_ERRORS, 1, run.agent, error, service)
        if run.outcome == "cancelled":
            stage = run.stage or "none"
            self._add(i.CANCELLATIONS, 1, run.scope, run.agent, stage, run.reason or "cancel")
            if run.cancel_ms is not None and run.end_ms is not None:
                self._observe(i.CANCEL_LATENCY, (run.end_ms - run.cancel_ms) * 1_000_000, stage)
        if run.attempts_exhausted:
            self._add(i.JOB_EXHAUSTED, 1, run.agent)
        if run.stream is not None:
            self._add(i.STREAM_EVENTS, run.stream.events, run.scope)
            self._add(i.STREAM_BYTES, run.stream.bytes, run.scope)
            self._add(i.STREAM_RETRIES, run.stream.retries, run.scope)
            self._add(i.STREAM_FAILURES, run.stream.failures, run.scope)

    def _note_node(self, node: NodeEnded) -> None:
        self._observe(i.NODE_DURATION, node.end_ns - node.start_ns, node.agent, node.node, node.outcome)
        for attempt in node.failed_attempts:
            self._note_call(node, attempt, attempt.error_type or "_OTHER")
        if node.model is not None:
            is_error = node.outcome in ("failed", "lost")
            self._note_call(
                node, node.model, (node.model.error_type or node.error_type or "_OTHER") if is_error else ""
            )

    def _note_call(self, node: NodeEnded, call: ModelCall, error: str) -> None:
        model = ("chat", call.provider, call.request_model)
        origin = (node.agent, call.response_model or "", node.service.name)
        self._observe(i.OPERATION_DURATION, call.end_ns - call.start_ns, *model, error, *origin)
        if call.first_chunk_ns is not None:
            self._observe(i.FIRST_CHUNK, call.first_chunk_ns, *model, *origin)
        self._merge(i.OUTPUT_CHUNK, call.chunk_counts, call.chunk_sum_ns, *model, *origin)
        self._add(i.USAGE, 1, call.usage.source)
        if call.usage.source != "missing":
            self._note_usage(node, call, origin)

    def _note_usage(self, node: NodeEnded, call: ModelCall, origin: tuple[str, str, str]) -> None:
        model, usage, service = call.request_model, call.usage, node.service.name
        self._observe(i.TOKEN_USAGE, usage.input, "chat", call.provider, model, "input", *origin)
        self._observe(i.TOKEN_USAGE, usage.output, "chat", call.provider, model, "output", *origin)
        parts = {
            "input": usage.input - usage.cache_read - usage.cache_write,
            "output": usage.output - usage.reasoning,
            "cache_read": usage.cache_read,
            "cache_write": usage.cache_write,
            "reasoning": usage.reasoning,
        }
        for kind, tokens in parts.items():
            self._add(i.TOKENS, tokens, node.scope, node.agent, model, kind, service)
        cost = price(call)
        if cost is not None:
            self._add(i.COST, cost, node.scope, node.agent, model, service)
        elif usage.input or usage.output:
            self._add(i.UNPRICED, 1, model, service)

    def _note_tool(self, tool: ToolEnded) -> None:
        error = tool.error_type or ("_OTHER" if tool.outcome == "error" else "")
        name = tool.tool if tool.known else "__unknown__"
        self._add(i.TOOL_CALLS, 1, tool.agent, name, tool.outcome)
        self._observe(
            i.TOOL_DURATION, tool.end_ns - tool.start_ns, name, error if tool.outcome in ("error", "retry") else ""
        )

    def _note_heartbeat(self, heartbeat: ProcessState) -> None:
        self._add(i.LISTENER_GAPS, heartbeat.gaps, heartbeat.service.name)
        self._add(i.LISTENER_REREADS, heartbeat.rereads, heartbeat.service.name)
        self._merge(i.APPEND_LATENCY, heartbeat.append_counts, heartbeat.append_sum_ns)

    def _add(self, instrument: Instrument, amount: int, *values: str) -> None:
        labels = dict(zip(instrument.labels, values, strict=True))
        self.truth[series_of(instrument.name, labels)] += amount

    def _observe(self, instrument: Instrument, value: int, *values: str) -> None:
        if value < 0:  # a clock was behind another: nothing takes less than no time
            self.below_zero[instrument.name] += 1
            value = 0
        counts = [int(low < value <= high) for low, high in _ranges(instrument)]
        self._merge(instrument, counts, value, *values)

    def _merge(self, instrument: Instrument, counts: Sequence[int], total: int, *values: str) -> None:
        """Add counts per bucket, as they were observed or as a process told them."""
        if not counts:
            return
        labels = dict(zip(instrument.labels, values, strict=True))
        for n, (_, high) in enumerate(_ranges(instrument)):
            bucket = series_of(f"{instrument.name}_bucket", {**labels, "le": str(high / instrument.scale)})
            self.truth[bucket] += sum(counts[: n + 1])
        self.truth[series_of(f"{instrument.name}_count", labels)] += sum(counts)
        self.truth[series_of(f"{instrument.name}_sum", labels)] += total


def _ranges(instrument: Instrument) -> list[tuple[float, float]]:
    bounds = (-_INFINITE, *instrument.buckets, _INFINITE)
    return list(pairwise(bounds))


def price(call: ModelCall) -> int | None:
    """Return what a response cost in nano-dollars: as reported, else by genai-prices; None where it has no price."""
    if call.usage.cost_nano_usd is not None:
        return call.usage.cost_nano_usd
    usage = genai_prices.Usage(
        input_tokens=call.usage.input,
        output_tokens=call.usage.output,
        cache_read_tokens=call.usage.cache_read,
        cache_write_tokens=call.usage.cache_write,
        cache_write_1h_tokens=call.usage.cache_write_1h,
    )
    when = datetime.fromtimestamp(call.start_ns / NANO, UTC)
    for model in (call.response_model, call.request_model):
        if model is None:
            continue
        try:
            found = genai_prices.calc_price(usage, model, provider_id=call.provider, genai_request_timestamp=when)
        except LookupError:
            continue
        return int((found.total_price * Decimal(NANO)).to_integral_value(ROUND_HALF_EVEN))
    return None
