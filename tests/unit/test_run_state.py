"""The state of a run: every transition of the picture in docs/design.md, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from agx.runs.state import TRANSITIONS, Phase, RunState, Step, TransitionError

DESIGN = Path(__file__).parents[2] / "docs" / "design.md"
PHASES: tuple[Phase, ...] = get_args(Phase)
STEPS: dict[Step, Callable[[RunState], None]] = {
    "begin": RunState.begin,
    "cancel": lambda state: state.cancel("cancel", 7),
    "end": RunState.end,
    "acknowledge": lambda state: state.acknowledge(9),
    "report": RunState.report,
    "recover": RunState.recover,
    "fence": RunState.fence,
    "hand_over": RunState.hand_over,
}
# What comes from outside may come too late, which is no defect.
IGNORED_WHEN_LATE = {"cancel", "acknowledge", "fence"}
# The shortest way into each phase.
WAYS: dict[Phase, tuple[Step, ...]] = {
    "opening": (),
    "live": ("begin",),
    "cancelling": ("begin", "cancel"),
    "ending": ("begin", "end"),
    "ended": ("begin", "end", "acknowledge"),
    "reported": ("begin", "end", "acknowledge", "report"),
    "recovered": ("begin", "end", "acknowledge", "recover"),
    "fenced": ("begin", "fence"),
    "handed_over": ("begin", "hand_over"),
}


def state_in(phase: Phase, parent: RunState | None = None) -> RunState:
    state = RunState(parent)
    for step in WAYS[phase]:
        STEPS[step](state)
    assert state.phase == phase
    return state


def test_the_table_is_the_picture() -> None:
    picture = DESIGN.read_text().split("stateDiagram-v2")[1].split("```")[0]
    drawn = {(before, step): after for before, after, step in re.findall(r"(\w+) --> (\w+): (\w+)", picture)}
    assert drawn == TRANSITIONS
    assert set(STEPS) == set(get_args(Step)) == {step for _, step in TRANSITIONS}


@pytest.mark.parametrize(("phase", "step"), list(product(PHASES, STEPS)))
def test_each_step_in_each_phase(phase: Phase, step: Step) -> None:
    state = state_in(phase)
    after = TRANSITIONS.get((phase, step))
    if after is None and step not in IGNORED_WHEN_LATE:
        with pytest.raises(TransitionError, match=phase):
            STEPS[step](state)
    else:
        STEPS[step](state)
    assert state.phase == (after or phase)


def test_a_cancel_while_the_run_opens_takes_effect_when_it_begins() -> None:
    state = RunState()
    state.cancel("shutdown")
    state.cancel("cancel", 7)
    assert (state.phase, state.cancel_reason, state.cancel_ms, state.must_stop) == ("opening", "shutdown", None, True)
    state.begin()
    assert state.phase == "cancelling"


@pytest.mark.parametrize("phase", PHASES)
def test_the_agent_is_stopped_once_and_only_while_it_works(phase: Phase) -> None:
    state, stops = state_in(phase), []
    state.on_stop = lambda: stops.append(state.phase)
    state.cancel("cancel", 7)
    state.cancel("task")
    assert len(stops) == (1 if phase in ("opening", "live") else 0)
    stops.clear()
    state.fence()
    state.fence()
    assert stops == (["fenced"] if phase in ("opening", "live", "cancelling", "ending") else [])


@pytest.mark.parametrize("phase", PHASES)
def test_what_each_phase_means(phase: Phase) -> None:
    state = state_in(phase)
    assert state.is_open == (phase in ("opening", "live", "cancelling", "fenced"))
    assert state.fenced == (phase == "fenced")
    assert state.suppressed == (phase in ("fenced", "recovered", "handed_over"))
    assert state.confirmed  # without a lease nobody else can finish it
    state.is_confirmed = lambda: False
    assert state.confirmed == (phase == "reported")


def test_a_sub_agents_run_follows_its_parent() -> None:
    parent = state_in("live")
    parent.is_confirmed = lambda: False
    child = state_in("live", parent)
    assert not child.confirmed
    parent.cancel("shutdown")
    assert child.cancel_reason == "shutdown"
    parent.fence()
    assert child.fenced
    assert child.suppressed
    assert child.phase == "live"
