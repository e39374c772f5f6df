"""A model of a takeover: attempt 1's process, attempt 2, the sidecar and a cancel, in every order of their steps.

The server's steps mirror the scripts one to one; `test_takeover_model` executes a sample of them on a real server. Time
is left out: a lease may expire at any moment, and so may the recovery time. Each attempt may die.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

# The entries of an attempt in their order: its first, an event, the end of a completed run; and a cancelled run's end.
ENTRIES = {"R": "bxe", "S": "ryf"}
CANCELLED = {"R": "c", "S": "d"}
LOST, SIDECAR_CANCELLED = "l", "k"
ENDS = "ecfdlk"
FENCES = "br" + ENDS  # kinds of entries behind which nobody else appends

Op = tuple[Any, ...]


@dataclass(frozen=True)
class Rules:
    """What the participants do; without one of them a run is damaged."""

    resume_compares: bool = True  # `resume` is refused where the stream has changed since it was read
    append_looks: bool = True  # an append is refused behind another attempt's `resume` or another's `end`
    take_over_keeps_mark: bool = True  # a cancel that came in the gap stays in the lease of attempt 2
    hand_over_keeps_mark: bool = True  # a cancel stays for the next attempt where this one gives the lease back
    gap_is_marked: bool = True  # a cancel in the gap is written down
    canceller_waits: bool = True  # a cancel that has marked a lease is made again where the mark expires with the lease
    finalize_compares: bool = True  # the sidecar's `end` is refused where the stream has changed since it was read
    waits_for_recovery: bool = True  # the sidecar leaves a run alone until its recovery time is over
    refused_gives_back: bool = True  # an attempt whose `resume` is refused gives the lease back


class Server(NamedTuple):
    """The live key (R, S: an attempt, with ! if marked; G: the mark of the gap; C: a claim) and the stream."""

    live: str | None = "R"
    stream: str = "b"

    def apply(self, op: Op, rules: Rules) -> tuple[Server, Any]:
        """Execute a command; returns the server afterwards and the reply."""
        name, *args = op
        live, stream = self
        match name:
            case "read_live":
                return self, live
            case "acquire":
                free = live is None or live.rstrip("!") == args[0]
                return (self._replace(live=live or args[0]) if free else self), free
            case "take_over":
                if live is not None and live != "G" and live.rstrip("!") != args[0]:
                    return self, False
                if live is not None and live.rstrip("!") == args[0]:
                    return self, True
                marked = live == "G" and rules.take_over_keeps_mark
                return self._replace(live=args[0] + "!" * marked), True
            case "release":
                ours = live is not None and live.rstrip("!") == args[0]
                return (self._replace(live=None) if ours else self), ours
            case "hand_over":
                if not rules.hand_over_keeps_mark:
                    return self.apply(("release", args[0]), rules)
                changes = {args[0]: None, f"{args[0]}!": "G"}
                return (self._replace(live=changes[live]) if live in changes else self), live in changes
            case "mark":
                if live in ("R", "S"):
                    return self._replace(live=live + "!"), "marked"
                return self, {None: "none", "C": "claimed"}.get(live, "marked")
            case "mark_gap":
                return (self._replace(live="G") if live is None else self), live is None
            case "claim":
                return (self._replace(live="C") if live is None else self), live is None
            case "expire":
                return self._replace(live=None), None
            case "append":
                behind, entry = args
                foreign = rules.append_looks and any(kind in FENCES for kind in stream.split(behind)[1])
                return (self, "refused") if foreign else (self._replace(stream=stream + entry), "ok")
            case "resume":
                changed = stream[-1] != args[0] and rules.resume_compares
                return (self, "refused") if changed else (self._replace(stream=stream + "r"), "ok")
            case "finalize":
                behind, entry = args
                changed = stream[-1] != behind and rules.finalize_compares
                return (self, False) if changed else (self._replace(stream=stream + entry), True)
        raise AssertionError(op)


class Attempt(NamedTuple):
    """A process. `at`: idle, looked, took (the lease), runs, ends (its last entry is handed over), done, dead."""

    at: str = "idle"
    acked: str = ""
    seen: str = ""  # the stream as it was read
    stop: bool = False  # it has found a cancel
    looked: bool = False  # it has looked at its lease
    fenced: bool = False


class Sidecar(NamedTuple):
    """`at`: idle, claimed, read."""

    at: str = "idle"
    seen: str = ""
    is_cancelled: bool = False


class State(NamedTuple):
    server: Server = Server()
    r: Attempt = Attempt("runs", "b", looked=True)
    s: Attempt = Attempt()
    sidecar: Sidecar = Sidecar()
    # "", asks (the key was found empty), waits (a lease is marked), asks again, accepted, refused. It counts as refused
    # where nobody can resume the run any more.
    cancel: str = ""
    too_late: bool = False  # the run was ending already when the cancel was accepted
    is_over: bool = False  # the recovery time
    expiries: int = 1
    deaths: int = 1

    def change(self, who: str, **changes: Any) -> State:
        return self._replace(**{who.lower(): getattr(self, who.lower())._replace(**changes)})


class Step(NamedTuple):
    """A transition: its name, the commands that the server executed, the state afterwards, what is wrong with it."""

    name: str
    ops: tuple[Op, ...]
    state: State
    wrong: str | None = None


class Model:
    """The steps that are possible in a state, under some rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def steps(self, state: State) -> Iterator[Step]:
        """Yield every step."""
        for who in ("R", "S"):
            yield from self._attempt(state, who)
        yield from self._sidecar(state)
        yield from self._cancel(state)
        yield from self._environment(state)

    def _do(self, state: State, *ops: Op) -> tuple[State, Any]:
        reply = None
        for op in ops:
            server, reply = state.server.apply(op, self.rules)
            state = state._replace(server=server)
        return state, reply

    def _environment(self, state: State) -> Iterator[Step]:
        live, dead = (
            state.server.live,
            {who for who in ("R", "S") if getattr(state, who.lower()).at in ("dead", "done")},
        )
        if live in ("R", "S", "C") and (state.expiries or live in dead or (live == "C" and state.sidecar.at == "idle")):
            after, _ = self._do(state, ("expire",))
            free = live in dead or live == "C"
            yield Step(f"{live} expires", (("expire",),), after._replace(expiries=state.expiries - (not free)))
        if live in ("R!", "S!") and state.cancel != "accepted" and (state.expiries or live[0] in dead):
            after, left = self._do(state, ("expire",))[0], state.expiries - (live[0] not in dead)
            yield Step(f"{live} expires", (("expire",),), after._replace(expiries=left))
        # A mark that nobody needs: only once the run has its `end`.
        elif live in ("R!", "S!", "G") and ended(state.server.stream):
            yield Step(f"{live} expires", (("expire",),), self._do(state, ("expire",))[0])
        if not state.is_over:
            yield Step("the recovery time is over", (), state._replace(is_over=True))
        for who in ("R", "S"):
            at = getattr(state, who.lower()).at
            # Known gap: an attempt takes the mark of the gap into its lease, and dies before it acts on it.
            taken_mark = live == f"{who}!" and state.cancel == "accepted"
            if state.deaths and at not in ("dead", "done", "idle") and not taken_mark:
                yield Step(f"{who} dies", (), state.change(who, at="dead")._replace(deaths=state.deaths - 1))

    # --- attempts ---

    def _attempt(self, state: State, who: str) -> Iterator[Step]:
        one: Attempt = getattr(state, who.lower())
        if one.at == "idle" and who == "S" and state.server.live in (None, "G") and not ended(state.server.stream):
            yield Step("S reads", (("read_live",),), state.change("S", at="looked", seen=state.server.stream))
        if one.at == "looked":
            after, taken = self._do(state, ("take_over", "S"))
            yield Step(
                f"S takes the lease: {taken}", (("take_over", "S"),), after.change("S", at="took" if taken else "idle")
            )
        if one.at == "took":
            yield from self._resume(state)
        if one.at in ("runs", "ends") and not one.fenced:
            yield from self._look(state, who)
            yield from self._append(state, who)
        if one.at in ("runs", "ends") and (one.fenced or one.acked in ENDS):
            op: Op = ("hand_over" if one.fenced else "release", who)
            yield Step(f"{who} leaves", (op,), self._do(state, op)[0].change(who, at="done"))

    def _resume(self, state: State) -> Iterator[Step]:
        op: Op = ("resume", state.s.seen[-1])
        after, reply = self._do(state, op)
        if reply == "ok":
            wrong = None if state.server.stream == state.s.seen else "it goes on from a stream that it has not read"
            yield Step("S resumes", (op,), after.change("S", at="runs", acked="r"), wrong)
        elif self.rules.refused_gives_back:
            after, _ = self._do(after, ("hand_over", "S"))
            yield Step("S is refused", (op, ("hand_over", "S")), after.change("S", at="idle"))
        else:
            yield Step("S is refused", (op,), after.change("S", at="idle"))

    def _look(self, state: State, who: str) -> Iterator[Step]:
        """Renew the lease, or take it again."""
        live = state.server.live
        if live in (who, f"{who}!"):
            yield Step(f"{who} renews", (("read_live",),), state.change(who, looked=True, stop=live == f"{who}!"))
        elif live is None:
            yield Step(f"{who} takes again", (("acquire", who),), self._do(state, ("acquire", who))[0])
        elif live == "G":
            yield Step(f"{who} takes the mark", (("take_over", who),), self._do(state, ("take_over", who))[0])
        elif live != "C":
            yield Step(f"{who} finds another owner", (("read_live",),), state.change(who, fenced=True))

    def _append(self, state: State, who: str) -> Iterator[Step]:
        one: Attempt = getattr(state, who.lower())
        if one.acked in ENDS or not one.looked:  # attempt 2 looks first, so it misses only a later cancel
            return
        entries = ENTRIES[who]
        entry = CANCELLED[who] if one.stop else entries[entries.index(one.acked) + 1]
        op: Op = ("append", one.acked, entry)
        after, reply = self._do(state, op)
        if reply == "refused":
            yield Step(f"{who} is fenced", (op,), after.change(who, fenced=True))
            return
        late = entry in ENDS and not one.stop and state.cancel in ("accepted", "waits", "asks again")
        after = after._replace(too_late=after.too_late or late)
        yield Step(f"{who} appends {entry}", (op,), after.change(who, acked=entry))

    # --- the sidecar and the cancel ---

    def _sidecar(self, state: State) -> Iterator[Step]:
        sidecar, server = state.sidecar, state.server
        if sidecar.at == "idle" and (state.is_over or not self.rules.waits_for_recovery) and not ended(server.stream):
            if server.live is None:
                after, _ = self._do(state, ("claim",))
                yield Step("claim", (("claim",),), after._replace(sidecar=Sidecar("read", server.stream)))
            elif server.live == "G":
                yield Step("read", (("read_live",),), state._replace(sidecar=Sidecar("read", server.stream, True)))
        if sidecar.at == "read" and not sidecar.is_cancelled and server.live != "C":
            # It renews its claim right before it appends, so that no claim expires in between.
            yield Step("the claim is lost", (("read_live",),), state._replace(sidecar=Sidecar()))
        elif sidecar.at == "read":
            op: Op = ("finalize", sidecar.seen[-1], SIDECAR_CANCELLED if sidecar.is_cancelled else LOST)
            after, done = self._do(state, op)
            release: Op = ("release", "C")
            after, _ = self._do(after, release)
            wrong = None
            if done and sidecar.seen != server.stream:
                wrong = "a live run is finalized"
            elif done and not state.is_over:
                wrong = "it is finalized while it can be resumed"
            yield Step(f"finalize: {done}", (op, release), after._replace(sidecar=Sidecar()), wrong)

    def _cancel(self, state: State) -> Iterator[Step]:
        if state.cancel == "":
            after, reply = self._do(state, ("mark",))
            if reply == "marked":
                yield Step("cancel: marked", (("mark",),), self._marked(after))
            elif reply == "none":
                yield Step("cancel: none", (("mark",),), after._replace(cancel="asks"))
        if state.cancel in ("asks", "asks again"):
            yield from self._mark_gap(state)
        if state.cancel == "waits":
            yield from self._wait(state)

    def _mark_gap(self, state: State) -> Iterator[Step]:
        again = state.cancel == "asks again"
        if state.is_over or (ended(state.server.stream) and not again):
            yield Step("cancel: nothing to cancel", (), state._replace(cancel="refused"))
        elif ended(state.server.stream):
            yield Step("cancel: it has ended", (), state._replace(cancel="accepted"))
        elif not self.rules.gap_is_marked:
            yield Step("cancel: nothing is written", (), self._accepted(state))
        else:
            after, done = self._do(state, ("mark_gap",))
            after = self._accepted(after) if done else after._replace(cancel="waits" if again else "")
            yield Step(f"mark the gap: {done}", (("mark_gap",),), after)

    def _wait(self, state: State) -> Iterator[Step]:
        """Wait until the run has ended, or its gap is marked; mark it again where the mark is gone."""
        live = state.server.live
        if state.is_over:
            yield Step("cancel: nobody can resume it", (), state._replace(cancel="refused"))
        elif ended(state.server.stream):
            yield Step("cancel: it has ended", (), state._replace(cancel="accepted"))
        elif live == "G":
            yield Step("cancel: the gap is marked", (("read_live",),), state._replace(cancel="accepted"))
        elif live in (None, "R", "S"):
            after, reply = self._do(state, ("mark",))
            after = after._replace(cancel="waits" if reply == "marked" else "asks again")
            yield Step(f"cancel again: {reply}", (("mark",),), after)

    def _marked(self, state: State) -> State:
        if not self.rules.canceller_waits:
            return self._accepted(state)
        return state._replace(cancel="waits", too_late=ended(state.server.stream))

    def _accepted(self, state: State) -> State:
        return state._replace(cancel="accepted", too_late=ended(state.server.stream))


def ended(stream: str) -> bool:
    """Return whether a stream has an `end`."""
    return any(entry in ENDS for entry in stream)


def fault(state: State, *, is_last: bool) -> str | None:
    """Return what is wrong with a state, or with one in which nothing happens any more."""
    stream = state.server.stream
    if sum(entry in ENDS for entry in stream) > 1:
        return "two ends"
    if "r" in stream and any(entry in "xec" for entry in stream.split("r", 1)[1]):
        return "the dead attempt writes behind `resume`"
    if stream.count("r") > 1 or not stream.startswith("b"):
        return "two resumes"
    marked = state.server.live in ("R!", "S!", "G")
    found = state.r.stop or state.s.stop
    if state.cancel == "accepted" and not (ended(stream) or marked or found):
        return "a cancel is lost"
    if not is_last:
        return None
    if not ended(stream):
        return "no end"
    if state.cancel == "accepted" and not state.too_late and not any(entry in "cdk" for entry in stream):
        return "a cancel is lost"
    return None


def explore(rules: Rules, start: State | None = None) -> tuple[int, str | None, list[str]]:
    """Visit every reachable state; returns their number, and the first fault with the steps that lead to it."""
    model, first = Model(rules), start or State()
    came_from: dict[State, tuple[State, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        steps = [step for step in model.steps(state) if step.state != state or step.wrong]
        wrong = next((step.wrong for step in steps if step.wrong), None) or fault(state, is_last=not steps)
        if wrong is not None:
            return len(came_from), wrong, _trace(came_from, state)
        for step in steps:
            if step.state not in came_from:
                came_from[step.state] = (state, step.name)
                queue.append(step.state)
    return len(came_from), None, []


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names: list[str] = []
    while (came := came_from[state]) is not None:
        state, name = came
        names.insert(0, name)
    return names
