"""How a run, a node or a tool ended, in the words of facts and spans."""

from __future__ import annotations

from dataclasses import dataclass

from ..facts.schema import Outcome, Reason
from ..telemetry.tracing import captures_content

_MOST_TEXT = 1_000  # characters of an exception's message


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    outcome: Outcome
    reason: Reason | None = None
    error: BaseException | None = None

    @property
    def error_type(self) -> str | None:
        return describe_type(self.error)

    @property
    def message(self) -> str | None:
        return describe_message(self.error)


def describe_type(error: BaseException | None) -> str | None:
    """Return an exception's type as `error.type` says it."""
    if error is None:
        return None
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def describe_message(error: BaseException | None) -> str | None:
    """Return an exception's message where content may leave: it may quote the prompt."""
    return str(error)[:_MOST_TEXT] if error is not None and captures_content() else None
