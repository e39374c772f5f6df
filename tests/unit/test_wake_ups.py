"""The wake-up that an append publishes: its entries are used only where it is certain which they are."""

from __future__ import annotations

import pytest

from agx.redis.entry_id import format_id
from agx.stream.append_scripts import read_wake_up
from agx.stream.entry import StreamEntry, to_arguments

ENTRIES = [
    StreamEntry((7, 1), "event", "pydantic-ai", b'{"seq":1}'),
    StreamEntry((7, 2), "info", "mine", b'{"seq":9}', b"2", b'{"usage":{}}'),
]


def wake_up(before: str, entries: list[StreamEntry]) -> bytes:
    """Return what the script publishes."""
    fields: list[str | bytes] = [str(len(entries)), before]
    for entry in entries:
        fields += (format_id(entry.id), *to_arguments(entry))
    return b"\n".join(field.encode() if isinstance(field, str) else field for field in fields)


def test_entries_are_read_as_they_were_appended() -> None:
    assert read_wake_up(wake_up("7-0", ENTRIES)) == ((7, 0), ENTRIES)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"7-2",  # the id alone: the entries are many, or large, or of another script
        b"0\n7-0",
        wake_up("7-0", ENTRIES)[:-40],
        wake_up("7-0", [StreamEntry((7, 1), "info", "two\nlines", b"{}")]),
        wake_up("7-0", [StreamEntry((7, 1), "info", "seven" + "\n" * 6 + "lines", b"{}")]),
    ],
)
def test_any_other_message_has_no_entries(message: bytes) -> None:
    assert read_wake_up(message) is None
