"""`make audit`: plays runs through three changes of the leader, prints the table, and fails on any difference.

AUDIT_RUNS (2000), AUDIT_SEED: repeats the same runs.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from dashboards.preview.stack import StackError

from .audit import Report, audit
from .verdict import Row

_COLUMNS = ("series", "label sets", "truth", "with relabelling", "without", "resets", "increase()", "of the truth",
            "without relabelling")  # fmt: skip


def print_report(report: Report) -> None:
    """Print the table in Markdown, and what was broken."""
    print(f"\n{report.made} made-up and {report.real} real runs, {report.entries} queue entries, {report.repeats} of "
          f"them repeats; {report.samples} samples.\n")  # fmt: skip
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|---|" + "--:|" * (len(_COLUMNS) - 1))
    for row in report.verdict.rows:
        if not row.name.endswith("_bucket"):
            print("| " + " | ".join(_cells(row)) + " |")
    for name, count in report.below_zero.items():
        print(f"\n{name}: {count} below zero, by two clocks; they count as 0.")
    for line in report.verdict.broken:
        print(f"BROKEN: {line}")
    print("\nNOT exact." if report.verdict.broken else "\nExact, in every bucket of the histograms too.")


def _cells(row: Row) -> tuple[str, ...]:
    counts = (row.truth, row.relabelled, row.plain)
    return (f"`{row.name}`", str(row.series), *(f"{each:f}" for each in counts), str(row.resets),
            f"{row.increase:.1f}", _ratio(row.increase, row), _ratio(row.increase_plain, row))  # fmt: skip


def _ratio(increase: float, row: Row) -> str:
    return f"{increase / float(row.truth):.2f}" if row.truth else "-"


def main() -> int:
    """Return the exit code."""
    runs = int(os.environ.get("AUDIT_RUNS") or 2_000)
    seed = int(os.environ.get("AUDIT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"audit: {runs} runs, AUDIT_SEED={seed}", flush=True)
    home = Path(tempfile.mkdtemp(prefix="agx-audit-"))
    try:
        report = audit(home, runs=runs, seed=seed, scrape=1.0, pause=0.03)
    except StackError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    print_report(report)
    if report.verdict.broken:
        print(f"the replicas' logs are in {home}", file=sys.stderr)
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
