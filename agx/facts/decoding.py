"""Parses facts: JSON of a scope queue becomes an object of `schema`.

It is not in `schema`, because pydantic takes 0.1 s to load, and services only write facts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .repair import classify, repair
from .schema import FORMAT, Fact

_LATER = ConfigDict(defer_build=True)  # built at the first fact
_ADAPTER: TypeAdapter[Fact] = TypeAdapter(Annotated[Fact, Field(discriminator="kind")], config=_LATER)


class UnknownFactError(ValueError):
    """A fact of a kind or format that this version does not know: pass it over and count it."""


class MalformedFactError(ValueError):
    """An entry that is no fact: set it aside and count it."""


def decode(data: bytes, on_repair: Callable[[], None] | None = None) -> Fact:
    """Parse a fact.

    A field of the wrong type is converted, or its default takes its place (issue 12, case A11): a fact is not lost for
    one field. `on_repair` is called when that happened.

    Raises:
        UnknownFactError: its kind or format is newer than this version.
        MalformedFactError: it is not a fact, or a field without a default can't be read, such as a time beyond 64 bits.
    """
    try:
        fact = _ADAPTER.validate_json(data)
    except ValidationError as error:
        repaired = repair(data, error, _ADAPTER)
        if repaired is None:
            is_newer, reason = classify(data, error, FORMAT)
            raise (UnknownFactError if is_newer else MalformedFactError)(reason) from None
        fact = repaired
        if on_repair is not None:
            on_repair()
    if fact.v > FORMAT:
        raise UnknownFactError(f"format {fact.v} is newer than {FORMAT}")
    return fact
