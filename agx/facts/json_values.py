"""Values as JSON can hold them: lone surrogates are replaced, and numbers brought into range."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can encode: a lone half of a surrogate pair becomes `?`."""
    return _LONE_SURROGATES.sub("?", text)


def to_json_values(value: Any) -> Any:
    """Return a value that orjson takes; of an object of an unknown kind only the type's name is left."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, int):
        return min(max(int(value), _SMALLEST), _LARGEST)
    if isinstance(value, (tuple, list)):
        return [to_json_values(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(str(name)): to_json_values(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return replace_surrogates(type(value).__name__)
