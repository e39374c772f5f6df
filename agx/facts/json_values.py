"""Values as a fact may have them: lone surrogates are replaced, numbers brought into range, long texts cut."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import orjson

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_USUAL = 8_192  # bytes of JSON whose texts need not be looked at
_MOST_TEXT = 1_000  # characters
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1


def compact(data: bytes) -> bytes:
    """Return a copy that takes no more memory than its length. Bytes that orjson 3.13 returns take at least 4 KiB."""
    return b"%b" % data


def dump_bounded(value: Any) -> bytes:
    """Return a value as JSON; in a large one texts are cut: a model may invent a tool's name of a megabyte."""
    try:
        data = orjson.dumps(value)
    except TypeError:
        data = b""
    return compact(data if 0 < len(data) <= _USUAL else orjson.dumps(to_json_values(value)))


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can encode: a lone half of a surrogate pair becomes `?`."""
    return _LONE_SURROGATES.sub("?", text)


def to_json_values(value: Any) -> Any:
    """Return a value that orjson takes, with texts of at most 1,000 characters.

    Of an object of an unknown kind only the type's name is left.
    """
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        return replace_surrogates(value[:_MOST_TEXT])
    if isinstance(value, int):
        return min(max(int(value), _SMALLEST), _LARGEST)
    if isinstance(value, (tuple, list)):
        return [to_json_values(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(str(name)): to_json_values(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return replace_surrogates(type(value).__name__)
