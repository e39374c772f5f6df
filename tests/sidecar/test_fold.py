"""Each metric of the catalogue, from facts made by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from support.made_facts import SERVICE, T0, TRACE_ID, call, ended, heartbeat, node, resumed, started, tool, trace, usage

from agx.facts.reader import QueueEntry
from agx.facts.schema import (
    APPEND_BUCKETS,
    Fact,
    Service,
    StreamTotals,
    encode,
)
from agx_sidecar.metrics import instruments as i
from agx_sidecar.metrics import table as t
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Cell, Counter, Histogram, Series
from agx_sidecar.metrics.table import Instrument

AT_MS = T0 // 1_000_000


class Folding:
    """A fold of one partition, fed with facts as they come from a queue."""

    def __init__(self) -> None:
        self.fold = Fold(Series(), Series(), {0: Position()})
        self._ids = itertools.count()

    def add(self, *these: Fact) -> None:
        for fact in these:
            self.add_raw(encode(fact))

    def add_raw(self, payload: bytes) -> None:
        self.fold.apply(0, [QueueEntry(f"{AT_MS}-{next(self._ids)}", payload)])

    def count(self, instrument: Instrument, *labels: str) -> int:
        """The sum of the series whose first labels are these: a label that is added later changes no test."""
        cells = self.matching(instrument, labels)
        assert all(isinstance(cell, Counter) for cell in cells)
        return sum(cell.value for cell in cells if isinstance(cell, Counter))

    def labelled(self, instrument: Instrument, label: str, value: str) -> int:
        """The sum, or the number of observations, of the series with this label."""
        at = instrument.labels.index(label)
        cells = [cell for labels, cell in self.fold.series.cells[instrument].items() if labels[at] == value]
        assert cells, f"no series of {instrument.name} has {label}={value}"
        return sum(cell.value if isinstance(cell, Counter) else sum(cell.counts) for cell in cells)

    def matching(self, instrument: Instrument, labels: tuple[str, ...]) -> list[Cell]:
        cells = self.fold.series.cells[instrument].items()
        found = [cell for known, cell in cells if known[: len(labels)] == labels]
        assert found, f"no series of {instrument.name} has the labels {labels}"
        return found

    def own(self, instrument: Instrument, *labels: str) -> int:
        cell = self.fold.own.cells[instrument][labels]
        assert isinstance(cell, Counter)
        return cell.value

    def histogram(self, instrument: Instrument, *labels: str) -> Histogram:
        (cell,) = self.matching(instrument, labels)
        assert isinstance(cell, Histogram)
        return cell

    def observed(self, instrument: Instrument, *labels: str) -> tuple[int, int]:
        """How many observations, and their sum."""
        cell = self.histogram(instrument, *labels)
        return sum(cell.counts), cell.sum


@pytest.fixture
def folding() -> Folding:
    return Folding()


def test_a_started_run_counts(folding: Folding) -> None:
    folding.add(started())
    assert folding.count(i.RUNS_STARTED, "acme", "support") == 1


def test_a_completed_run_counts_its_duration_calls_and_stream(folding: Folding) -> None:
    folding.add(ended())
    assert folding.count(i.RUNS, "acme", "support", "completed") == 1
    assert folding.observed(i.RUN_DURATION, "support", "completed") == (1, 2_500_000_000)
    assert folding.observed(i.INVOKE_DURATION, "support", "") == (1, 2_500_000_000)
    assert folding.observed(i.INFERENCE_CALLS, "support", "") == (1, 2)
    assert folding.observed(i.TOOL_CALLS_PER_RUN, "support", "") == (1, 1)
    assert folding.count(i.STREAM_EVENTS, "acme") == 12
    assert folding.count(i.STREAM_BYTES, "acme") == 3_400
    assert folding.count(i.STREAM_RETRIES, "acme") == 1
    assert folding.count(i.STREAM_FAILURES, "acme") == 0


@pytest.mark.parametrize("outcome", ["failed", "lost"])
def test_a_run_in_error_counts_its_type(folding: Folding, outcome: str) -> None:
    folding.add(ended(outcome=outcome, error_type="ModelHTTPError"), ended("run-2", outcome=outcome))
    assert folding.count(i.RUNS, "acme", "support", outcome) == 2
    assert folding.count(i.RUN_ERRORS, "support", "ModelHTTPError") == 1
    assert folding.count(i.RUN_ERRORS, "support", t.OTHER_ERROR) == 1
    assert folding.observed(i.INVOKE_DURATION, "support", "ModelHTTPError") == (1, 2_500_000_000)


def test_a_cancelled_run_is_no_error_and_tells_stage_reason_and_latency(folding: Folding) -> None:
    cancelled = {"outcome": "cancelled", "reason": "cancel", "stage": "call_tools", "error_type": "Ignored"}
    folding.add(ended(**cancelled, cancel_ms=1_000, end_ms=1_012))
    folding.add(ended("run-2", outcome="cancelled", reason="task", stage=None))
    assert folding.count(i.CANCELLATIONS, "acme", "support", "call_tools", "cancel") == 1
    assert folding.count(i.CANCELLATIONS, "acme", "support", "none", "task") == 1
    assert folding.observed(i.CANCEL_LATENCY, "call_tools") == (1, 12_000_000)
    assert folding.observed(i.INVOKE_DURATION, "support", "")[0] == 2
    assert sum(cell.value for cell in folding.fold.series.cells[i.RUN_ERRORS].values()) == 0  # type: ignore[union-attr]


def test_a_resumed_run_counts_its_attempts_and_how_long_it_had_no_process(folding: Folding) -> None:
    folding.add(started(), resumed(attempt=2), resumed(attempt=3), ended())
    assert folding.count(i.RUNS_STARTED, "acme", "support") == 1
    assert folding.count(i.RUNS, "acme", "support", "completed") == 1
    assert folding.count(i.RESUMES, "support") == 2
    assert folding.observed(i.RECOVERY, "support") == (2, 2 * 2_300_000_000)
    assert folding.own(i.FACTS, "run.resume") == 2


def test_a_job_counts_its_wait_and_a_run_without_one_does_not(folding: Folding) -> None:
    folding.add(started("run-1", waited_ns=4_000), started("run-2"))
    assert folding.observed(i.JOB_WAIT, "support") == (1, 4_000)


def test_exhausted_attempts_are_zero_initialized_and_count(folding: Folding) -> None:
    folding.add(started())
    assert folding.count(i.JOB_EXHAUSTED, "support") == folding.count(i.RESUMES, "support") == 0
    folding.add(ended("run-1", outcome="lost"), ended("run-2", outcome="lost", attempts_exhausted=True))
    assert folding.count(i.JOB_EXHAUSTED, "support") == 1


def test_the_time_to_the_first_text_is_of_runs_that_showed_some(folding: Folding) -> None:
    folding.add(started(), ended("run-1", first_text_ns=690_000_000), ended("run-2", first_text_ns=None))
    assert folding.observed(i.FIRST_TOKEN, "support") == (1, 690_000_000)


def test_plain_runs_are_zero_initialized_and_add_up(folding: Folding) -> None:
    folding.add(started())
    assert folding.count(i.PLAIN_RUNS, "support") == 0
    folding.add(ended("run-1", plain_runs=2), ended("run-2", plain_runs=1), ended("run-3"))
    assert folding.count(i.PLAIN_RUNS, "support") == 3


def test_services_with_an_agent_of_one_name_stay_apart(folding: Folding) -> None:
    for name in ("shop", "desk"):
        of = {"service": Service(name)}
        failed = ended(f"{name}-2", outcome="failed", error_type="Busy", **of)
        folding.add(started(name, **of), node(name, **of), ended(name, **of), failed)
    for name in ("shop", "desk"):
        assert folding.labelled(i.RUNS_STARTED, "service", name) == 1
        assert folding.labelled(i.RUNS, "service", name) == 2
        assert folding.labelled(i.RUN_DURATION, "service", name) == 2
        assert folding.labelled(i.RUN_ERRORS, "service", name) == 1
        assert folding.labelled(i.TOKENS, "service", name) == 1_200
        assert folding.labelled(i.COST, "service", name) == folding.count(i.COST) // 2
        assert folding.labelled(i.UNPRICED, "service", name) == 0


@pytest.mark.parametrize("instrument", [i.OPERATION_DURATION, i.FIRST_CHUNK, i.OUTPUT_CHUNK, i.TOKEN_USAGE])
def test_model_requests_have_the_name_of_their_agent(folding: Folding, instrument: Instrument) -> None:
    folding.add(node(), node("run-2", agent="writer"))
    expected = folding.labelled(instrument, "gen_ai_agent_name", "support")
    assert expected > 0
    assert folding.labelled(instrument, "gen_ai_agent_name", "writer") == expected


def test_a_model_request_counts_times_chunks_tokens_and_cost(folding: Folding) -> None:
    folding.add(node())
    model = ("chat", "openai", "gpt-4o-mini")
    assert folding.observed(i.NODE_DURATION, "support", "model_request", "completed") == (1, 700_000_000)
    assert folding.observed(i.OPERATION_DURATION, *model, "") == (1, 600_000_000)
    assert folding.observed(i.FIRST_CHUNK, *model) == (1, 150_000_000)
    assert folding.observed(i.OUTPUT_CHUNK, *model) == (10, 123_456_789)
    assert folding.histogram(i.OUTPUT_CHUNK, *model).counts[:3] == [7, 0, 3]
    assert folding.observed(i.TOKEN_USAGE, *model, "input") == (1, 1_000)
    assert folding.observed(i.TOKEN_USAGE, *model, "output") == (1, 200)
    used = [folding.count(i.TOKENS, "acme", "support", "gpt-4o-mini", kind) for kind in t.TOKEN_TYPES]
    assert used == [650, 160, 300, 50, 40]
    assert sum(used) == 1_000 + 200
    assert folding.count(i.USAGE, "reported") == 1
    # Per million tokens: 0.15 $ of input (writing to the cache is free at OpenAI), 0.075 cached, 0.60 of output.
    assert folding.count(i.COST, "acme", "support", "gpt-4o-mini") == 700 * 150 + 300 * 75 + 200 * 600
    assert folding.count(i.UNPRICED, "gpt-4o-mini") == 0


def test_tokens_and_runs_of_agents_and_scopes_stay_apart(folding: Folding) -> None:
    folding.add(node(), node("run-2", scope="other", agent="writer"))
    assert folding.count(i.TOKENS, "acme", "support", "gpt-4o-mini", "input") == 650
    assert folding.count(i.TOKENS, "other", "writer", "gpt-4o-mini", "input") == 650


def test_a_model_without_a_price_is_counted_not_guessed(folding: Folding) -> None:
    own = call(provider="our-gateway", request_model="ours", response_model=None)
    folding.add(node(model=own))
    assert folding.count(i.UNPRICED, "ours") == 1
    assert folding.count(i.COST, "acme", "support", "ours") == 0


def test_usage_that_is_missing_counts_no_tokens(folding: Folding) -> None:
    missing = call(usage=usage(input=0, output=0, cache_read=0, cache_write=0, reasoning=0, source="missing"))
    folding.add(node(model=missing, outcome="cancelled"))
    assert folding.count(i.USAGE, "missing") == 1
    assert folding.observed(i.TOKEN_USAGE, "chat", "openai", "gpt-4o-mini", "input") == (0, 0)
    assert folding.observed(i.OPERATION_DURATION, "chat", "openai", "gpt-4o-mini", "")[0] == 1


def test_estimated_usage_counts_and_says_so(folding: Folding) -> None:
    folding.add(node(model=call(usage=usage(source="estimated"))))
    assert folding.count(i.USAGE, "estimated") == 1
    assert folding.count(i.TOKENS, "acme", "support", "gpt-4o-mini", "cache_read") == 300


def test_each_failed_attempt_is_an_observation_of_its_model(folding: Folding) -> None:
    failed = call(request_model="first", usage=usage(input=9), error_type="Busy", first_chunk_ns=None, chunk_counts=())
    folding.add(node(failed_attempts=(failed, failed)))
    assert folding.observed(i.OPERATION_DURATION, "chat", "openai", "first", "Busy")[0] == 2
    assert folding.observed(i.OPERATION_DURATION, "chat", "openai", "gpt-4o-mini", "")[0] == 1
    assert folding.count(i.USAGE, "reported") == 3


def test_a_failed_model_request_has_its_error_type(folding: Folding) -> None:
    folding.add(node(outcome="failed", error_type="ModelHTTPError", model=call(first_chunk_ns=None, chunk_counts=())))
    assert folding.observed(i.OPERATION_DURATION, "chat", "openai", "gpt-4o-mini", "ModelHTTPError")[0] == 1
    assert folding.observed(i.FIRST_CHUNK, "chat", "openai", "gpt-4o-mini") == (0, 0)
    assert folding.observed(i.OUTPUT_CHUNK, "chat", "openai", "gpt-4o-mini") == (0, 0)


def test_a_node_of_another_kind_counts_its_duration_only(folding: Folding) -> None:
    folding.add(node(node="call_tools", model=None, outcome="failed"))
    assert folding.observed(i.NODE_DURATION, "support", "call_tools", "failed") == (1, 700_000_000)
    assert i.OPERATION_DURATION not in folding.fold.series.cells


@pytest.mark.parametrize(
    ("outcome", "error_type", "label"),
    [
        ("ok", None, ""),
        ("retry", None, ""),
        ("retry", "ModelRetry", "ModelRetry"),
        ("error", "ValueError", "ValueError"),
        ("error", None, t.OTHER_ERROR),
        ("cancelled", "CancelledError", ""),
        ("denied", None, ""),
        ("deferred", None, ""),
    ],
)
def test_a_tool_call_is_one_observation_however_it_ended(
    folding: Folding, outcome: str, error_type: str | None, label: str
) -> None:
    folding.add(tool(outcome=outcome, error_type=error_type))
    assert folding.count(i.TOOL_CALLS, "support", "lookup", outcome) == 1
    assert folding.observed(i.TOOL_DURATION, "lookup", label) == (1, 30_000_000)


def test_a_process_beat_adds_its_increments_and_is_kept_for_the_gauges(folding: Folding) -> None:
    counts = [0] * (len(APPEND_BUCKETS) + 1)
    counts[1] = 4
    folding.add(heartbeat(1, append_counts=tuple(counts), append_sum_ns=4_000_000), heartbeat(2, listeners=9))
    assert folding.count(i.LISTENER_GAPS, "shop") == 4
    assert folding.count(i.LISTENER_REREADS, "shop") == 8
    assert folding.observed(i.APPEND_LATENCY) == (4, 4_000_000)
    assert folding.fold.heartbeats["shop", "pod-1"][1].listeners == 9


def test_counts_of_other_buckets_are_not_merged(folding: Folding) -> None:
    folding.add(heartbeat(1, append_counts=(1, 2, 3), append_sum_ns=5))
    assert folding.observed(i.APPEND_LATENCY) == (0, 0)


def test_a_repeated_fact_counts_once(folding: Folding) -> None:
    folding.add(ended(), ended(), started())
    assert folding.count(i.RUNS, "acme", "support", "completed") == 1
    assert folding.own(i.FACTS, "repeat") == 1
    assert folding.own(i.FACTS, "run.end") == 1
    assert folding.fold.positions[0].count == 3


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b"{}", b'{"kind":"run.end","id":7}', b"null"])
def test_a_malformed_fact_is_counted_and_passed_over(folding: Folding, payload: bytes) -> None:
    folding.add_raw(payload)
    folding.add(ended())
    assert folding.own(i.MALFORMED) == 1
    assert folding.count(i.RUNS, "acme", "support", "completed") == 1
    assert folding.fold.positions[0].count == 2


def test_a_newer_fact_is_counted_as_unknown(folding: Folding) -> None:
    folding.add_raw(b'{"kind":"weather","id":"x","v":1}')
    folding.add_raw(encode(ended(v=99)))
    assert folding.own(i.FACTS, "unknown") == 2
    assert i.RUNS not in folding.fold.series.cells


def test_series_of_an_agent_are_zero_initialized(folding: Folding) -> None:
    folding.add(started())
    for outcome in t.OUTCOMES:
        assert folding.count(i.RUNS, "acme", "support", outcome) == 0
        assert folding.observed(i.RUN_DURATION, "support", outcome) == (0, 0)
    for stage, reason in itertools.product(t.STAGES, t.REASONS):
        assert folding.count(i.CANCELLATIONS, "acme", "support", stage, reason) == 0
    assert folding.count(i.RUN_ERRORS, "support", t.OTHER_ERROR) == 0
    folding.add(tool())
    for outcome in set(t.TOOL_OUTCOMES) - {"ok"}:
        assert folding.count(i.TOOL_CALLS, "support", "lookup", outcome) == 0


def test_an_exemplar_leads_to_the_trace_of_a_sampled_run_only(folding: Folding) -> None:
    folding.add(ended("run-1", trace=trace(sampled=False)))
    assert folding.histogram(i.RUN_DURATION, "support", "completed").exemplars is None
    folding.add(ended("run-2"))
    exemplars = folding.histogram(i.RUN_DURATION, "support", "completed").exemplars
    assert exemplars is not None
    assert [kept for kept in exemplars if kept] == [(TRACE_ID, 2_500_000_000, T0 + 2_500_000_000)]


def test_a_clock_set_back_counts_as_no_time(folding: Folding) -> None:
    folding.add(ended(end_ns=T0 - 1))
    assert folding.observed(i.RUN_DURATION, "support", "completed") == (1, 0)


def test_counters_never_fall_whatever_a_fact_says(folding: Folding) -> None:
    folding.add(ended("run-1"), ended("run-2", stream=StreamTotals(events=-100, bytes=-1)))
    assert folding.count(i.STREAM_EVENTS, "acme") == 12


def test_two_processes_of_a_service_are_two_heartbeats(folding: Folding) -> None:
    folding.add(heartbeat(1), heartbeat(2, service=Service(SERVICE.name, None, "pod-2")))
    assert set(folding.fold.heartbeats) == {("shop", "pod-1"), ("shop", "pod-2")}


def test_an_invented_tool_does_not_take_the_room_of_a_real_one(folding: Folding) -> None:
    folding.add(*(tool(call_id=f"c{n}", tool=f"invented-{n}", known=False, outcome="retry") for n in range(110)))
    folding.add(tool(call_id="real"))
    assert folding.count(i.TOOL_CALLS, "support", t.UNKNOWN_TOOL, "retry") == 110
    assert folding.observed(i.TOOL_DURATION, t.UNKNOWN_TOOL, "")[0] == 110
    assert folding.count(i.TOOL_CALLS, "support", "lookup", "ok") == 1
    assert folding.fold.series.take_overflows() == {}


def test_names_of_any_length_are_cut_and_not_cached(folding: Folding) -> None:
    for n in range(3):
        folding.add(ended(f"run-{n}", agent="a" * 200 + str(n)))
    assert folding.count(i.RUNS, "acme", "a" * 200, "completed") == 3
    assert folding.count(i.RUNS, "acme", "a" * 200, "failed") == 0


def test_cost_is_what_the_response_was_priced_at(folding: Folding) -> None:
    folding.add(node(model=call(request_model="ours", usage=usage(cost_nano_usd=77))))
    assert folding.count(i.COST, "acme", "support", "ours") == 77
    assert folding.count(i.UNPRICED, "ours") == 0


def test_a_repaired_fact_counts_and_the_repair_too(folding: Folding) -> None:
    folding.add_raw(encode(node()).replace(b'"output":200', b'"output":200.9'))
    assert folding.count(i.TOKENS, "acme", "support", "gpt-4o-mini", "output") == 160
    assert folding.own(i.REPAIRED) == 1
    assert folding.own(i.FACTS, "node") == 1


@pytest.mark.parametrize("field", ["start_ns", "end_ns"])
def test_a_time_beyond_all_measure_is_malformed(folding: Folding, field: str) -> None:
    raw = json.loads(encode(ended()))
    for number in (-(10**400), 10**400, int("9" * 4_299)):
        folding.add_raw(json.dumps({**raw, "id": str(number)[:9], field: number}).encode())
    assert folding.own(i.MALFORMED) == 3
    assert i.RUNS not in folding.fold.series.cells


def test_an_idle_agent_is_forgotten_and_counts_again_from_zero(folding: Folding) -> None:
    folding.add(ended("run-1"))
    now = AT_MS // 1000
    folding.fold.forget_idle(now)
    assert folding.count(i.RUNS, "acme", "support", "completed") == 1
    folding.fold.forget_idle(now + t.SERIES_IDLE + 1)
    assert not folding.fold.series.cells[i.RUNS]
    folding.add(ended("run-2"))
    assert folding.count(i.RUNS, "acme", "support", "completed") == 1


def test_a_busy_agent_is_not_idle(folding: Folding) -> None:
    folding.add(ended("run-1"))
    for hours in range(1, 40):
        at_ms = AT_MS + hours * 3_600_000
        folding.fold.apply(0, [QueueEntry(f"{at_ms}-0", encode(ended(f"later-{hours}")))])
        folding.fold.forget_idle(at_ms // 1000)
    assert folding.count(i.RUNS, "acme", "support", "completed") == 40


def test_a_label_that_is_added_to_a_row_is_fed_and_zero_initialized() -> None:
    runs = dataclasses.replace(i.RUNS, by=(t.SCOPE, t.AGENT, t.OUTCOME, t.SERVICE))
    fold = Fold(Series(), Series(), {0: Position()}, [runs if each is i.RUNS else each for each in i.CATALOGUE])
    for n, service in enumerate(("shop", "desk")):
        begun = started(f"run-{n}", service=Service(service))
        fold.apply(0, [QueueEntry(f"{AT_MS}-{n}", encode(begun))])
        assert ("acme", "support", "lost", service) in fold.series.cells[runs]
    assert len(fold.series.cells[runs]) == 2 * len(t.OUTCOMES)
    fold.apply(0, [QueueEntry(f"{AT_MS}-9", encode(ended("run-1", service=Service("desk"))))])
    assert fold.series.counter(runs, "acme", "support", "completed", "desk").value == 1


@pytest.mark.parametrize("count", [2**63, 10**400], ids=["2**63", "10**400"])
def test_counts_beyond_64_bits_are_left_out(folding: Folding, count: int) -> None:
    raw = json.loads(encode(node()))
    raw["model"]["chunk_counts"][0] = count
    folding.add_raw(json.dumps(raw).encode())
    assert folding.observed(i.OUTPUT_CHUNK, "chat", "openai", "gpt-4o-mini") == (0, 0)
    assert folding.count(i.TOKENS, "acme", "support", "gpt-4o-mini", "output") == 160


def test_runs_of_two_sessions_with_one_id_count_both() -> None:
    """A run's id is its caller's choice, and two tenants may choose the same."""
    folding = Folding()
    sessions = [{"scope": scope, "session": session} for scope in ("acme", "globex") for session in ("s1", "s2")]
    for ids in sessions:
        folding.add(started(**ids), ended(**ids), ended(**ids))
    assert folding.count(i.RUNS_STARTED) == folding.count(i.RUNS) == 4
