"""The codecs of what is stored: a stream's entries, and the entries of a scope queue, in either shape of a reply."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from support.made_facts import started

from agx.facts.reader import QueueEntry, QueuePages, parse_entries, read_page
from agx.facts.schema import FIELD, ProcessState, Service, encode
from agx.stream.entry import StreamEntry, to_fields
from agx.stream.events import encode_body

FACT = ProcessState(id="p:1", at_ns=1, service=Service("s"), listeners=0, buffered_events=0, silence_ns=0)


def flat(*fields: str | bytes) -> list[bytes]:
    return [field.encode() if isinstance(field, str) else field for field in fields]


@pytest.mark.parametrize("shape", [list, lambda fields: dict(zip(fields[::2], fields[1::2], strict=True))])
def test_an_entry_is_read_as_it_was_written(shape: Any) -> None:
    entry = StreamEntry.of(b"7-1", shape(flat(*to_fields("info", "mine", b'{"n":1}'))))
    assert entry.to_dict() == {"id": "7-1", "type": "info", "origin": "mine", "body": {"n": 1}}
    assert json.loads(entry.to_json()) == entry.to_dict()


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (flat("type", b"\xff"), {}),
        (flat("type", "info", "body", "[1]"), {"raw": "[1]"}),
        (flat("type", "info", "body", b"{\xff"), {"raw": "{\ufffd"}),
        (flat("x", "y", "odd"), {}),
    ],
)
def test_an_entry_of_others_may_hold_anything(fields: list[bytes], body: dict[str, Any]) -> None:
    entry = StreamEntry.of(b"7-0", fields)
    assert entry.body == body
    assert json.loads(entry.to_json())["body"] == body


def test_an_event_is_one_line_whatever_the_stored_body_looks_like() -> None:
    entry = StreamEntry.of(b"7-0", flat("type", "info", "body", '{\n"a":\r\n"x\\ny"}'))
    assert "\n" not in entry.to_json()
    assert "\r" not in entry.to_json()
    assert json.loads(entry.to_json())["body"] == {"a": "x\ny"}


class Queue:
    """A scope queue that answers XRANGE and XREVRANGE as a server does."""

    def __init__(self, length: int) -> None:
        self.ids = [f"{n}-0" for n in range(1, length + 1)]
        self.reads = 0

    async def call(self, command: str, _key: str, start: str, _end: str, _count: str, count: int) -> Any:
        self.reads += 1
        ids = self.ids if command == "XRANGE" else self.ids[::-1]
        if start not in {"-", "+"}:
            at = ids.index(start.lstrip("("))
            ids = ids[at + start.startswith("(") :]
        return [(entry_id.encode(), [FIELD.encode(), encode(FACT)]) for entry_id in ids[:count]]


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 25])
async def test_pages_hold_every_entry_once_and_in_order(length: int, newest_first: bool) -> None:
    queue = Queue(length)
    pages = [page async for page in QueuePages(queue.call, "q", newest_first=newest_first, count=10)]
    ids = [entry.id for page in pages for entry in page]
    assert ids == (queue.ids[::-1] if newest_first else queue.ids)
    assert all(pages)


async def test_pages_go_on_from_an_id() -> None:
    queue = Queue(5)
    assert [entry.id for entry in await read_page(queue.call, "q", start="3-0")] == ["3-0", "4-0", "5-0"]
    assert [entry.id async for page in QueuePages(queue.call, "q", start="(3-0", count=1) for entry in page] == [
        "4-0",
        "5-0",
    ]
    assert [entry.id for entry in await read_page(queue.call, "q", start="(3-0", newest_first=True)] == ["2-0", "1-0"]


def test_what_is_no_fact_is_distinguished_from_one() -> None:
    good, newer, bad, none, trimmed = parse_entries(
        [
            (b"1-0", {FIELD.encode(): encode(FACT)}),
            (b"2-0", [FIELD.encode(), b'{"kind": "future", "id": "f"}']),
            (b"3-0", [FIELD.encode(), b"{"]),
            (b"4-0", [b"other", b"x"]),
            (b"5-0", None),
        ]
    )
    assert (good.fact, good.fact_key) == (FACT, "p:1")
    assert (newer.fact, newer.fact_key) == (None, "f")
    run = started()
    assert QueueEntry("6-0", encode(run)).fact_key == run.key  # of a newer format it is read from the bytes
    assert [entry.fact for entry in (bad, none, trimmed)] == [None, None, None]
    assert [entry.fact_key for entry in (bad, none, trimmed)] == [None, None, None]


def encode_event() -> bytes:
    entry = StreamEntry((7, 1), "info", "mine", b'{"n":1}')
    entry.to_json()
    assert entry._json is not None
    return entry._json


@pytest.mark.parametrize(
    "encoded",
    [
        lambda: encode_body({"event": "part_delta", "content_delta": "hello"}, 1_000),
        lambda: encode_body({"event": "llm-end", "value": 2**70}, 1_000),
        encode_event,
        lambda: StreamEntry((7, 1), "info", "mine", b'{"n":1}').to_frame(),
        lambda: encode(FACT),
    ],
    ids=["body", "body of odd values", "event", "frame", "fact"],
)
def test_what_is_kept_takes_the_memory_of_its_bytes(encoded: Callable[[], bytes]) -> None:
    encoded()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = [encoded() for _ in range(100)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < sum(map(len, kept)) + 100 * 200
