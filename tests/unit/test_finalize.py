"""A lost run is finalized from whatever its stream holds: other clients write to it too."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agx.facts import schema as facts
from agx.facts.decoding import decode
from agx.recovery.finalize import Finalization, finalize_run
from agx.recovery.recorded_run import RecordedRun
from agx.redis.keys import SessionKeys
from agx.stream.entry import StreamEntry

SESSION = SessionKeys.of("agx", 1, 1, "s")
BEGIN = {"run_id": "r", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "agent": "a", "service": "web", "seq": 0}


def entry(n: int, type: bytes, body: object, origin: bytes = b"opale") -> StreamEntry:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return StreamEntry.of(f"{1_000 + n}-0".encode(), {b"type": type, b"origin": origin, b"body": raw})


def finalize(*entries: StreamEntry) -> Finalization:
    missing = finalize_run(SESSION, "r", RecordedRun.of("r", entries), [])
    for fact in missing.facts:
        assert decode(facts.encode(fact)) == fact
    return missing


_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=5),
        st.sampled_from(["r", "begin", "end", "llm-begin", "llm-end", "answer", "tool-call", "lost", "completed"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)  # fmt: skip
_NAMES = [
    "run_id", "seq", "traceparent", "agent", "service", "sdk", "parent_span_id", "retention", "manual", "follows",
    "outcome", "reason", "error_type", "event", "idx", "model", "provider", "part_kind", "tool_name", "tool_call_id",
    "tool_outcome",
]  # fmt: skip
_BODY = st.one_of(
    st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=6).map(orjson.dumps),
    st.sampled_from([b"", b"\xff", b"[1]", b'{"seq": 1e400}', b'{"idx": ' + b"9" * 400 + b"}", b'{"a": "\\ud800"}']),
)
_ENTRY = st.tuples(st.sampled_from([b"begin", b"event", b"event", b"error", b"info", b"end", b"\xff"]), _BODY)


@given(begin=st.one_of(st.just(orjson.dumps(BEGIN)), _BODY), rest=st.lists(_ENTRY, max_size=6))
def test_no_stream_is_an_error(begin: bytes, rest: list[tuple[bytes, bytes]]) -> None:
    missing = finalize(entry(0, b"begin", begin), *(entry(n, *one) for n, one in enumerate(rest, 1)))
    assert (missing.error is None) == (missing.end is None)
    if missing.facts:
        assert missing.facts[-1].id == "r:end"


@given(body=st.fixed_dictionaries(dict.fromkeys(_NAMES, _JSON)))
def test_a_begin_of_odd_values_is_finalized(body: dict[str, Any]) -> None:
    missing = finalize(entry(0, b"begin", {**body, "run_id": "r", "manual": False}))
    assert missing.end is not None
    assert missing.outcome == "lost"


def test_an_id_at_the_end_of_time_fits_a_fact() -> None:
    last = StreamEntry.of(b"18446744073709551615-1", {b"type": b"info"})
    missing = finalize(entry(0, b"begin", BEGIN), last)
    assert isinstance(missing.facts[-1], facts.RunEnded)


@pytest.mark.parametrize("foreign", [None, "step-1", 500, 1, 2, 3, True, -1, 1.0, 2**60, [1]])
def test_only_the_runs_own_seq_counts(foreign: object) -> None:
    """An entry of another client stands at each place of a run with the entries 0, 1 and 2."""
    own = [{**BEGIN}, {"seq": 1, "event": "llm-begin", "idx": 0}, {"seq": 2, "event": "llm-end", "idx": 0}]
    for place in range(1, 4):
        entries = [entry(2 * n, b"begin" if n == 0 else b"event", body) for n, body in enumerate(own)]
        entries.insert(place, entry(2 * place - 1, b"info", {"seq": foreign}, b"opale"))
        missing = finalize(*entries)
        assert missing.error is not None
        assert missing.end is not None
        # Only one that continues the sequence at its very end can't be told from the run's own.
        first = 4 if (place, foreign) == (3, 3) else 3
        assert (missing.error["seq"], missing.end["seq"]) == (first, first + 1)


def test_a_sequence_whose_start_was_trimmed_goes_on() -> None:
    entries = [entry(n, b"event", {"seq": 40 + n}, b"pydantic-ai") for n in range(3)]
    missing = finalize(entry(0, b"info", {"seq": 7}, b"user"), *entries)
    assert missing.error is not None
    assert missing.error["seq"] == 43


def test_a_stream_that_another_run_has_restarted_says_nothing() -> None:
    missing = finalize(entry(0, b"begin", {**BEGIN, "run_id": "other"}), entry(1, b"end", {"outcome": "completed"}))
    assert missing == Finalization(None, None, (), "lost")


def test_the_end_in_the_stream_decides_the_outcome() -> None:
    end = {"run_id": "r", "outcome": "cancelled", "reason": "cancel", "seq": 1}
    missing = finalize(entry(0, b"begin", BEGIN), entry(1, b"end", end))
    ended = missing.facts[-1]
    assert (missing.error, missing.end, missing.outcome) == (None, None, "cancelled")
    assert isinstance(ended, facts.RunEnded)
    assert (ended.outcome, ended.reason, ended.error_type) == ("cancelled", "cancel", None)


def test_the_time_to_the_first_text_is_read_from_the_stream() -> None:
    def text(n: int, **body: object) -> StreamEntry:
        return entry(n, b"event", {"idx": 0, "event": "part_delta", **body}, b"pydantic-ai")

    begin = entry(0, b"begin", BEGIN | {"waited_ms": 40})
    thinking = text(10, part_kind="thinking", content_delta="hm")
    empty = text(20, part_kind="text", content_delta="")
    user = entry(25, b"info", {"part_kind": "text", "content": "not the agent's"}, b"me")
    shown = (text(30, part_kind="text", content_delta="Hi"), text(50, part_kind="text", content_delta=" there"))
    for entries, expected in (((), None), (shown, (30 + 40) * 1_000_000)):
        last = finalize(begin, thinking, empty, user, *entries).facts[-1]
        assert isinstance(last, facts.RunEnded)
        assert last.first_text_ns == expected
