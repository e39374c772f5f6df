"""`make chaos`: plays all scenes, prints the table of faults and their effects, and fails unless the promises hold.

CHAOS_MINUTES (5): how long faults strike, over all scenes. CHAOS_SEED: repeats the same choices of faults.
CHAOS_SCENES: names of scenes, separated by commas; all by default.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from .counting import BacklogScene, LeaderScene, MemoryScene
from .durable import SCENES as SCENES_OF_DURABLE_RUNS
from .durable import DurableScene, KillPointsScene
from .scenes import SCENES as SCENES_OF_RUNS
from .scenes import Scene
from .user_input import SCENES as USER_INPUT_SCENES
from .user_input import QueuedScene, SteeredScene
from .verdict import Verdict

AnyScene = (
    Scene | LeaderScene | BacklogScene | MemoryScene | DurableScene | KillPointsScene | SteeredScene | QueuedScene
)
SCENES: tuple[AnyScene, ...] = (
    *SCENES_OF_RUNS,
    LeaderScene(),
    BacklogScene(),
    MemoryScene(),
    *SCENES_OF_DURABLE_RUNS,
    *USER_INPUT_SCENES,
)

_COLUMNS = ("scene", "faults", "runs", "outcomes", "not started", "events lost", "repeated", "listeners hung",
            "spans missing", "facts missed", "measured", "held")  # fmt: skip
_BROKEN_SHOWN = 20
_SHORT = 2.0  # minutes; below, scenes that take long to start are left out unless they are named


def chosen_scenes(minutes: float) -> list[AnyScene]:
    names = [name.strip() for name in os.environ.get("CHAOS_SCENES", "").split(",") if name.strip()]
    if unknown := set(names) - {scene.name for scene in SCENES}:
        sys.exit(f"CHAOS_SCENES: {sorted(unknown)} unknown; there are {', '.join(scene.name for scene in SCENES)}")
    is_short = minutes < _SHORT
    return [scene for scene in SCENES if (scene.name in names if names else scene.in_short or not is_short)]


def print_table(verdicts: Sequence[Verdict]) -> None:
    rows = [_COLUMNS, *(_row(verdict) for verdict in verdicts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for n, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if n == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _row(verdict: Verdict) -> tuple[str, ...]:
    faults = ", ".join(f"{count} {what}" for what, count in sorted(verdict.faults.items()))
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(verdict.outcomes.items()))
    counts = (verdict.unavailable, verdict.lost, verdict.repeated, verdict.hung, verdict.spans_missing,
              verdict.facts_missed)  # fmt: skip
    held = "yes" if not verdict.broken else f"NO ({len(verdict.broken)})"
    measured = "; ".join(verdict.times)
    return (verdict.name, faults, str(verdict.runs), outcomes, *(str(count) for count in counts), measured, held)


async def _play(scene: AnyScene, seconds: float, seed: int, home: Path) -> Verdict:
    try:
        return await scene.play(seconds, seed, home)
    except Exception as error:  # the other scenes have something to say too
        traceback.print_exc()
        return Verdict(scene.name, broken=[f"it broke off: {type(error).__name__}: {error}"])


async def main() -> int:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    minutes = float(os.environ.get("CHAOS_MINUTES") or 5)
    scenes = chosen_scenes(minutes)
    unit = minutes * 60 / sum(scene.weight for scene in scenes)
    print(f"chaos: {len(scenes)} scenes in {minutes:g} minutes, CHAOS_SEED={seed}", flush=True)
    verdicts = []
    for scene in scenes:
        print(f"  {scene.name} ... ", end="", flush=True)
        started = time.monotonic()
        home = Path(tempfile.mkdtemp(prefix="agx-chaos-"))
        verdict = await _play(scene, max(scene.least, unit * scene.weight), seed, home)
        verdicts.append(verdict)
        held = "held" if not verdict.broken else f"BROKEN, see {home}"
        print(f"{verdict.runs} runs, {held}, {time.monotonic() - started:.0f} s", flush=True)
        for measured in verdict.times:
            print(f"    {measured}", flush=True)
        for broken in verdict.broken[:_BROKEN_SHOWN]:
            print(f"    {broken}", flush=True)
    print_table(verdicts)
    return 1 if any(verdict.broken or not verdict.runs for verdict in verdicts) else 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
