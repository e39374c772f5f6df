"""What a session's run will say, known from its id alone: to the worker that runs it and to the listener."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: its words, the pause between two, and how long the tool takes that it calls first. Seconds."""

    words: int
    pause: float
    calls_tool: bool
    tool_takes: float

    @property
    def text(self) -> str:
        return "".join(f"{n} " for n in range(self.words))

    @property
    def model_calls(self) -> int:
        return 2 if self.calls_tool else 1


def plan_of(session: str) -> Plan:
    """Return the plan of a session, some tenths of a second to a few seconds long."""
    chance = random.Random(session)
    words, pause, calls_tool = chance.randint(10, 120), chance.uniform(0.005, 0.03), chance.random() < 0.3
    return Plan(words, pause, calls_tool, tool_takes=pause * 10)


def slowed(plan: Plan, slowness: float) -> Plan:
    """Return the same words with longer pauses, for many runs at a time."""
    return replace(plan, pause=plan.pause * slowness)


def scope_of(session: str) -> str:
    """Return the tenant of a session."""
    return f"t{random.Random(session + '/scope').randint(0, 4)}"
