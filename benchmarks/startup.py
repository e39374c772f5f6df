"""What a start costs: the commands and the sidecar, beside the interpreter alone and the import of pydantic-ai."""

from __future__ import annotations

import resource
import subprocess
import sys

from .report import Row

_ROUNDS = 3


def measure_startup() -> list[Row]:
    """Measure the CPU seconds until each is loaded."""
    bare, upstream = _load("pass"), _load("import pydantic_ai")
    return [
        Row(what, f"{goal:.2f} s", f"{bare:.2f} s", f"{cost:.2f} s", f"pydantic-ai: {upstream:.2f} s", cost <= goal)
        for what, goal, cost in (
            ("CPU to load `agx.errors`", 0.35, _load("import agx.errors")),
            ("CPU to load `agx ls`", 0.35, _load("import agx.cli")),
            ("CPU to load the sidecar", 0.7, _load("import agx_sidecar.app")),
        )
    ]


def _load(code: str) -> float:
    """Return the least CPU of some interpreters that run a piece of code."""
    costs = []
    for _ in range(_ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(costs)
