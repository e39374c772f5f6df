"""Percentiles, and how figures are written in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delays:
    """Delays of many deliveries, in milliseconds."""

    count: int
    p50: float
    p99: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Delays:
        ranked = sorted(nanoseconds)
        if not ranked:
            return cls(0, float("nan"), float("nan"))

        def at(share: float) -> float:
            return ranked[min(len(ranked) - 1, int(len(ranked) * share))] / 1e6

        return cls(len(ranked), at(0.5), at(0.99))

    def __str__(self) -> str:
        return f"{self.p50:.1f} / {self.p99:.1f} ms"
