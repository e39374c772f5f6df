"""Which attempts of a run made progress, as its stream shows them."""

from __future__ import annotations

import orjson
import pytest

from agx.recovery.attempts import Attempt, count_failed, read_attempts
from agx.recovery.recorded_run import RecordedRun
from agx.stream.entry import StreamEntry

# Attempts are separated by `|`; `ask` and `answered` are a model request, `call X` a tool call of its response,
# `X ok` and `X error` its result. A call that an attempt before had under way gets `X error` where it is interrupted.
POISON = "begin ask call:x answered |{}".format(" resume x:error ask call:x answered |" * 3)
POISON_BESIDE = "begin ask call:x call:y answered y:ok |{}".format(
    " resume x:error ask call:x call:y answered y:ok |" * 3
)
POISON_REQUEST = "begin ask | resume ask | resume ask |"


def entries(script: str) -> list[StreamEntry]:
    made, idx = [], -1
    for n, word in enumerate(script.replace("|", "").split()):
        what, _, more = word.partition(":")
        body: dict[str, object] = {"run_id": "r", "seq": n, "recover": 60, "max_attempts": 3}
        kind = what if what in ("begin", "resume") else "event"
        if what == "resume":
            body["handed_over"] = more == "handed-over"
        elif what == "ask":
            idx += 1
            body |= {"event": "llm-begin", "idx": idx}
        elif what == "answered":
            body |= {"event": "llm-end", "idx": idx}
        elif what == "call":
            body |= {"event": "part_start", "part_kind": "tool-call", "tool_name": more, "tool_call_id": f"{more}{idx}"}
        elif kind == "event":
            body |= {"event": "part_start", "part_kind": "tool-return", "tool_name": what, "tool_outcome": more}
            body["tool_call_id"] = f"{what}{idx}"
        fields = {b"type": kind.encode(), b"origin": b"opale", b"body": orjson.dumps(body)}
        made.append(StreamEntry.of(f"{1_000 + n}-0".encode(), fields))
    return made


@pytest.mark.parametrize("script", [POISON, POISON_BESIDE, POISON_REQUEST])
def test_a_run_that_stops_each_process_in_the_same_step_exhausts_its_attempts(script: str) -> None:
    run = RecordedRun.of("r", entries(script))
    assert run.failed_attempts == 3
    assert run.is_exhausted


@pytest.mark.parametrize(
    ("script", "failed"),
    [
        ("begin", 1),
        ("begin ask answered", 0),
        ("begin ask call:x answered | resume x:ok", 0),  # the call was made again
        ("begin ask call:x answered | resume x:error", 1),  # it was only reported as interrupted
        ("begin ask call:x answered | resume x:error ask answered", 0),  # the model goes on without it
        ("begin ask call:x answered x:ok ask | resume ask answered", 0),
        ("begin ask call:x answered x:error ask | resume ask", 1),  # a failed call is a completed one
        ("begin ask call:x answered | resume x:error ask call:x answered x:ok ask call:x answered", 0),
    ],
)
def test_progress_is_a_completed_step(script: str, failed: int) -> None:
    assert count_failed(read_attempts(entries(script))) == failed


def test_attempts_that_were_handed_over_do_not_count() -> None:
    script = "begin | resume:handed-over | resume | resume:handed-over"
    assert read_attempts(entries(script)) == (
        Attempt(False, True), Attempt(False), Attempt(False, True), Attempt(False)
    )  # fmt: skip
    assert count_failed(read_attempts(entries(script))) == 2
    assert count_failed(read_attempts(entries(script), handed_over=True)) == 1
    assert not RecordedRun.of("r", entries("begin " + "resume:handed-over " * 9), deadline_ms=-1e15).failed_attempts


def test_a_handed_over_attempt_that_made_progress_ends_a_row_of_failed_ones() -> None:
    assert count_failed(read_attempts(entries("begin | resume ask answered | resume:handed-over ask"))) == 1
