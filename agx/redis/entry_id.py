"""Ids of stream entries, as numbers that compare."""

from __future__ import annotations

StreamId = tuple[int, int]


def parse_id(text: str) -> StreamId:
    """Return a stream id as comparable numbers; raises ValueError."""
    ms, _, n = text.partition("-")
    return int(ms), int(n or 0)


def format_id(entry_id: StreamId) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"
