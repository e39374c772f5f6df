"""A model of a run that begins while a recovery works: every order of their steps.

The process enters its deadline, takes the lease and sends `begin`; it may die at each step, and `begin` may arrive
late. A recovery looks at runs past their deadline. A deadline passes and a lease expires at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Rules:
    """The rules that the process and the server follow. Without either one, runs can get lost."""

    deadline_comes_first: bool = True  # the deadline is in Redis before `begin` is sent
    begin_is_in_time: bool = True  # the server appends `begin` only before the deadline that its sender has entered


class State(NamedTuple):
    """The server, the process and the recovery.

    Args:
        deadline: "", "future" or "past".
        live: "": nobody, P: the process, C: the recovery's claim.
        stream: "": nothing, b: `begin`, be: with its `end`.
        process: enters, acquires, sends, waits, begun or dead.
        in_flight: how many times `begin` was sent and not executed yet.
        entering: the deadline is on its way, where the process does not wait for it.
        recovery: idle, claims, reads, removes, ends or releases.
        late: how many more times the deadline may pass before the run has begun.
    """

    deadline: str = ""
    live: str = ""
    stream: str = ""
    process: str = "enters"
    in_flight: int = 0
    entering: bool = False
    recovery: str = "idle"
    late: int = 2


def steps(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    """Yield every step that is possible, and the state after it."""
    yield from _environment(state, rules)
    if state.process not in ("begun", "dead"):
        yield "the process dies", state._replace(process="dead", entering=False)
        yield from _process(state, rules)
    elif state.process == "begun":
        yield "the process dies", state._replace(process="dead", entering=False)
    yield from _recovery(state)


def _environment(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    if state.deadline == "future" and (state.late or state.process == "dead"):
        yield "the deadline passes", state._replace(deadline="past", late=max(0, state.late - 1))
    if state.live == "P" and state.deadline != "future":
        yield "the lease expires", state._replace(live="")
    if state.entering:
        yield "the deadline arrives", state._replace(entering=False, deadline="future")
    if state.in_flight:
        arrived = state._replace(in_flight=state.in_flight - 1)
        if rules.begin_is_in_time and state.deadline != "future":
            waits = state.process == "waits"
            yield "`begin` is late", arrived._replace(process="enters") if waits else arrived
        elif not state.stream:
            begun = "begun" if state.process == "waits" else state.process
            yield "`begin` is appended", arrived._replace(stream="b", process=begun)


def _process(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    if state.process == "enters" and rules.deadline_comes_first:
        yield "enter the deadline", state._replace(deadline="future", process="acquires")
    elif state.process == "enters":
        yield "send the deadline", state._replace(entering=True, process="acquires")
    elif state.process == "acquires" and state.live in ("", "P"):
        yield "take the lease", state._replace(live="P", process="sends")
    elif state.process == "sends":
        yield "send `begin`", state._replace(process="waits", in_flight=state.in_flight + 1)


def _recovery(state: State) -> Iterator[tuple[str, State]]:
    match state.recovery:
        case "idle" if state.deadline == "past" and not state.live:
            yield "look", state._replace(recovery="claims")
        case "claims":
            yield "claim", state._replace(live="C", recovery="reads") if not state.live else _rest(state)
        case "reads":
            yield "read the stream", state._replace(recovery="ends" if state.stream == "b" else "removes")
        case "ends":
            yield "end the run", state._replace(stream="be", recovery="removes")
        case "removes":
            # A deadline that the process has moved meanwhile stays.
            gone = "" if state.deadline == "past" else state.deadline
            yield "remove the deadline", state._replace(deadline=gone, recovery="releases")
        case "releases":
            yield "release the claim", _rest(state)


def _rest(state: State) -> State:
    return state._replace(live="" if state.live == "C" else state.live, recovery="idle")


def fault(state: State) -> str | None:
    """Return what is wrong with a state."""
    if state.process == "dead" and state.stream == "b" and not state.deadline and state.recovery == "idle":
        return "no recovery finds the run"
    return None


def explore(rules: Rules) -> tuple[int, str | None, list[str]]:
    """Visit every state that can be reached; returns their number, and the first fault with the steps to it."""
    start = State()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if (wrong := fault(state)) is not None:
            return len(came_from), wrong, _trace(came_from, state)
        for name, after in steps(state, rules):
            if after not in came_from:
                came_from[after] = (state, name)
                queue.append(after)
    return len(came_from), None, []


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names: list[str] = []
    while (came := came_from[state]) is not None:
        state, name = came
        names.insert(0, name)
    return names
