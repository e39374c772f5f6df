"""What sub-agents do is on their caller's stream, and no reader takes it for what the caller does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import orjson
import pytest
from rich.console import Console

from agx.cli.tail import Screen
from agx.demo.run_view import RunView
from agx.facts.schema import RunEnded
from agx.listeners.replayed_run import ReplayedRun, SubAgentEvent
from agx.listeners.void import Void, find_voids, is_void
from agx.recovery.attempts import read_attempts
from agx.recovery.finalize import finalize_run
from agx.recovery.recorded_run import RecordedRun
from agx.redis.keys import SessionKeys
from agx.stream.entry import StreamEntry
from agx.stream.events import UserBody

TAGS = {"run": "inner", "parent_run": "r", "agent": "researcher", "parent_tool_call_id": "c1", "depth": 1}
BEGIN = {"run_id": "r", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "agent": "a", "service": "web"}


def _step(event: str, idx: int = 0, **body: Any) -> tuple[str, str, dict[str, Any]]:
    return "event", "pydantic-ai", {"idx": idx, "event": event, **body}


def _part(kind: str, **body: Any) -> tuple[str, str, dict[str, Any]]:
    return _step("part_start", event_idx=0, part_kind=kind, **body)


ASK = {"tool_name": "ask", "tool_call_id": "c1"}
BEFORE = [
    ("begin", "opale", BEGIN),
    _step("llm-begin", model="m"),
    _part("tool-call", **ASK, args={}),
    _step("llm-end"),
]
STEPS = [
    _step("llm-begin", model="n"),
    _part("text", content="nested"),
    _step("part_delta", event_idx=0, part_kind="text", content_delta=" text"),
    _part("tool-call", tool_name="look", tool_call_id="c1", args={}),
    _step("llm-end"),
    _part("tool-return", tool_name="look", tool_call_id="c1", content="y", tool_outcome="ok"),
    _step("llm-begin", 1),
    _step("answer", 1),
    _step("llm-end", 1),
    _step("llm-begin", 2),
]
NESTED = [("event", "sub-agent", {**body, **TAGS}) for _, _, body in STEPS]
AFTER = [
    _part("tool-return", **ASK, content="x", tool_outcome="ok"),
    _step("llm-begin", 1),
    _part("text", content="answer"),
]


def _entries(*events: tuple[str, str, dict[str, Any]]) -> list[StreamEntry]:
    return [
        StreamEntry.of(
            b"1000-0",  # all at one time, which the number of entries does not change
            {b"type": kind.encode(), b"origin": origin.encode(), b"body": orjson.dumps(body | {"seq": n})},
        )
        for n, (kind, origin, body) in enumerate(events)
    ]


def _record(entries: Sequence[StreamEntry]) -> object:
    record = RecordedRun.of("r", entries)
    return replace(record, totals=None, next_seq=None, sub_agents=(), sample=record.sample.events)  # type: ignore[arg-type]


def _facts(entries: Sequence[StreamEntry]) -> object:
    session = SessionKeys.of("agx", 1, 1, "s")
    return [
        replace(fact, stream=None) if isinstance(fact, RunEnded) else fact
        for fact in finalize_run(session, "r", RecordedRun.of("r", entries), []).facts
        if fact.run_id == "r"
    ]


def _replay(entries: Sequence[StreamEntry]) -> object:
    run = ReplayedRun()
    events = [event for entry in entries for event in run.read(entry) if not isinstance(event, SubAgentEvent)]
    return re.sub(r"timestamp=datetime\S+( \S+?)*?\)", "", repr(events))


def _view(entries: Sequence[StreamEntry]) -> object:
    view = RunView("1", "1", "s", "a", "hi", began=0)
    for entry in entries:
        view.show(entry.to_dict())
    return view


@pytest.mark.parametrize("read", [_record, _facts, read_attempts, _replay, _view])
def test_no_reader_mixes_them_into_the_run(read: Callable[[Sequence[StreamEntry]], object]) -> None:
    # The caller's tool has returned, or is under way, or the stream's start was trimmed.
    for before, after in ((BEFORE, AFTER), (BEFORE, []), (BEFORE[:1], [])):
        assert read(_entries(*before, *NESTED, *after)) == read(_entries(*before, *after))


def test_their_numbers_are_the_runs() -> None:
    assert RecordedRun.of("r", _entries(*BEFORE, *NESTED)).next_seq == len(BEFORE) + len(NESTED)
    assert RecordedRun.of("r", _entries(*NESTED)).next_seq == len(NESTED)  # its start was trimmed


def test_an_unfinished_request_of_the_run_does_not_void_them() -> None:
    resume = ("resume", "opale", {"void": {"idx": 0, "from_seq": 0}})
    entries = _entries(*BEFORE, *NESTED, resume)
    voids = find_voids(entries)
    assert voids == [Void((1000, 0), 0)]
    later = [replace(entry, id=(999, 0)) for entry in entries[:-1]]
    assert [entry.origin for entry in later if not is_void(entry, voids)] == ["opale"] + ["sub-agent"] * len(NESTED)


def test_what_a_user_adds_is_none_of_them() -> None:
    assert UserBody({"x": 1}).is_ambiguous("sub-agent")


def test_a_tail_names_the_sub_agent() -> None:
    screen = Screen(Console(file=(shown := StringIO()), width=200))
    for entry in _entries(*BEFORE, *NESTED[:3], *AFTER):
        screen.show(entry)
    assert shown.getvalue().splitlines() == [
        "● a  run r",
        "model request, idx 0  m",
        "⚙ ask()",
        "  researcher │ model request, idx 0  n",
        "  researcher │ nested text",
        "  ↳ ok  ask: x",
        "model request, idx 1  ",
        "answer",
    ]
