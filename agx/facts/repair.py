"""Repairs a fact that does not validate: a value of the wrong type is converted, else dropped, so its default applies.

Such facts come from services of other versions and from providers with unusual JSON (issue 12, case A11).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

T = TypeVar("T")
Path = tuple[int | str, ...]

_ROUNDS = 16  # a dropped value may make its parent invalid: more rounds than a fact has levels


def repair(data: bytes, error: ValidationError, adapter: TypeAdapter[T]) -> T | None:
    """Return the object in `data`, whose validation raised `error`, without the values that can't be read.

    Returns None where a required value of the object itself can't be read, or `data` is no JSON object.
    """
    try:
        raw = from_json(data)
    except ValueError:
        return None
    if not isinstance(raw, dict):
        return None
    for _ in range(_ROUNDS):
        details = error.errors(include_url=False, include_context=False)
        # The first part of a location is the union's tag. All paths are found before any value goes.
        problems = [(_existing_path(raw, detail["loc"][1:]), detail["type"]) for detail in details]
        for path, problem in problems:
            if not path:
                return None
            _convert_or_drop(raw, path, problem)
        try:
            return adapter.validate_python(raw)
        except ValidationError as next_error:
            error = next_error
    return None


def _existing_path(raw: Any, location: Sequence[int | str]) -> Path:
    """Return the part of a location that exists: of a missing field its parent, of a union's member the value."""
    path: list[int | str] = []
    for step in location:
        if not isinstance(raw, dict | list):
            break
        try:
            raw = raw[step]  # type: ignore[index]
        except (LookupError, TypeError):
            break
        path.append(step)
    return tuple(path)


def _convert_or_drop(raw: Any, path: Path, problem: str) -> None:
    holder, keys = raw, list(path)
    try:
        for step in keys[:-1]:
            holder = holder[step]
        value = holder[keys[-1]]
    except KeyError:  # dropped already, with its parent
        return
    converted = _convert(value, problem)
    if converted is not None:
        holder[keys[-1]] = converted
        return
    first_index = next((at for at, step in enumerate(keys) if isinstance(step, int)), len(keys))
    holder = raw
    for step in keys[: first_index - 1]:  # a list is dropped as a whole: a shorter one would mean something else
        holder = holder[step]
    del holder[keys[first_index - 1]]


def _convert(value: Any, problem: str) -> Any:
    """Return a number as text or a fraction as an integer where that is what is missing, else None."""
    if problem == "string_type" and type(value) in {int, float} and abs(value) < 2**63:
        return str(value)
    if problem == "int_from_float" and isinstance(value, float) and math.isfinite(value):
        return int(value)
    return None


def classify(data: bytes, error: ValidationError, newest: int) -> tuple[bool, str]:
    """Return whether an entry that is no fact is of a newer version than `newest`, and what is wrong with it."""
    try:
        raw = from_json(data)
    except ValueError:
        return False, "not JSON"
    if isinstance(raw, dict):
        if isinstance(v := raw.get("v"), int) and v > newest:
            return True, f"format {v} is newer than {newest}"
        if error.errors(include_input=False)[0]["type"] == "union_tag_invalid":
            return True, f"kind {str(raw.get('kind'))[:40]!r} is not known"
    # Field names only: an entry's values may be anybody's content.
    where = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
    return False, f"invalid at {where or 'the top'}"
