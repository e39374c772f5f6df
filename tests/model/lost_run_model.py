"""A model of a run's process, a recovery and a second run around one session: every order of their steps.

The server's steps mirror the scripts one to one (`Server.apply`); `test_lost_run_model` executes a sample of them on a
real server. Time is left out: a lease or a claim may expire at any moment, a reply may be lost, a command may be
executed after its sender has given up, each participant may die. Budgets bound how often.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

OURS = "bxe"  # the run's entries, in their order: `begin`, an event, `end`
LOST = "l"  # the recovery's `error` and `end`
OTHER = "2"  # the second run's `begin`, which drops all others

Op = tuple[Any, ...]


@dataclass(frozen=True)
class Rules:
    """What the participants do; each flag is False in the version in which runs got lost."""

    claim_is_undecided: bool = True  # a claim in the live key is neither a cancel nor another owner
    fenced_keeps_deadline: bool = True  # only who knows that the fact is queued removes the deadline
    own_end_decides: bool = True  # the run's own `end` in the stream decides, whatever became of the lease
    waits_for_begin: bool = True  # a recovery leaves a run alone whose successor has not begun


class Server(NamedTuple):
    """What Redis holds of the session and the run."""

    live: str | None = "R"  # R: the run, 2: the second run, C: a claim
    stream: str = "b"
    facts: str = ""  # outcomes of queued run.end facts: e (completed) or l (lost)
    deadline: int = 1  # 0: no member; announcing it changes its score

    def apply(self, op: Op) -> tuple[Server, Any]:
        """Execute a command; returns the server afterwards and the reply."""
        name, *args = op
        match name:
            case "acquire":
                free = self.live in (None, args[0])
                return (self._replace(live=args[0]) if free else self), free or self.live
            case "renew" | "read_live":
                return self, self.live
            case "release":
                return (self._replace(live=None) if self.live == args[0] else self), self.live == args[0]
            case "claim":
                return (self._replace(live="C") if self.live is None else self), self.live is None
            case "expire":
                return self._replace(live=None), None
            case "append":
                behind, entry = args
                if behind not in self.stream:
                    return self, "lost"
                if any(kind in "le2" for kind in self.stream.split(behind)[1]) or entry in self.stream:
                    return self, "refused"
                return self._replace(stream=self.stream + entry), "ok"
            case "begin_other":
                return self._replace(stream=OTHER), "ok"
            case "end_lost":
                same = bool(self.stream) and self.stream[-1] == args[0]
                return (self._replace(stream=self.stream + LOST) if same else self), same
            case "read_stream":
                return self, self.stream
            case "add_fact":
                return self._replace(facts=self.facts + args[0]) if args[0] not in self.facts else self, None
            case "read_facts":
                return self, bool(self.facts)
            case "announce":
                return self._replace(deadline=1 if self.deadline != 1 else 2), None
            case "remove":
                seen = args[0]
                return (self._replace(deadline=0) if seen in (None, self.deadline) else self), None
        raise AssertionError(op)


class Process(NamedTuple):
    """The run's process. `at`: runs, drains, tells, releases, removes, done, dead."""

    at: str = "runs"
    acked: str = "b"
    sent: bool = False  # an entry is in flight whose reply has not come
    handed: str = "x"  # the last entry handed over
    renewal: str = ""  # "missing": the lease was found missing, and is to be taken again
    lost: bool = False  # another owner was found in the live key
    fenced: bool = False  # another's `begin` or `end` was found in the stream
    held: bool = True  # the lease has not expired since it was last confirmed
    proved: bool = True  # an append was acknowledged since the lease was last taken
    checking: bool = False
    told: bool = False  # the fact was found in the queue
    counted: bool = False
    result: str = ""  # e: the caller gets the answer, l: LeaseLostError


class Recovery(NamedTuple):
    """A sidecar's look at the run."""

    at: str = "idle"
    seen: int = 0  # the deadline that was read
    stream: str = ""
    told: bool = False


class Budget(NamedTuple):
    """How often things still go wrong."""

    expiries: int = 2
    replies: int = 1
    deaths: int = 1
    crashes: int = 1


class State(NamedTuple):
    server: Server = Server()
    process: Process = Process()
    recovery: Recovery = Recovery()
    other: str = ""  # the second run: "", acquired, begun, gone
    budget: Budget = Budget()
    late: tuple[Op, ...] = ()  # commands that may be executed after their sender has given up

    def run(self, op: Op) -> tuple[State, Any]:
        server, reply = self.server.apply(op)
        return self._replace(server=server), reply

    def p(self, **changes: Any) -> State:
        return self._replace(process=self.process._replace(**changes))

    def r(self, **changes: Any) -> State:
        return self._replace(recovery=self.recovery._replace(**changes))

    def spend(self, name: str) -> State:
        return self._replace(budget=self.budget._replace(**{name: getattr(self.budget, name) - 1}))


class Step(NamedTuple):
    """A transition: its name, the commands that the server executed, and the state afterwards."""

    name: str
    ops: tuple[Op, ...]
    state: State


class Model:
    """The steps that are possible in a state, under some rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def steps(self, state: State) -> Iterator[Step]:
        """Yield every step."""
        yield from self._environment(state)
        if state.process.at not in ("done", "dead"):
            yield from self._process(state)
        yield from self._recovery(state)
        yield from self._other(state)

    def _environment(self, state: State) -> Iterator[Step]:
        if state.server.live in ("R", "C") and (state.budget.expiries or state.process.at in ("done", "dead")):
            after, _ = state.run(("expire",))
            if state.server.live == "R":
                after = after.p(held=False, proved=False)
            if state.budget.expiries:
                after = after.spend("expiries")
            yield Step(f"{state.server.live} expires", (("expire",),), after)
        for op in state.late:
            after, _ = state._replace(late=()).run(op)
            yield Step(f"late {op}", (op,), after)
        if state.budget.deaths and state.process.at not in ("done", "dead"):
            yield Step("the process dies", (), state.spend("deaths").p(at="dead"))

    # --- the run's process ---

    def _process(self, state: State) -> Iterator[Step]:
        process = state.process
        if process.at in ("runs", "drains") and not process.lost:
            yield self._renew(state)
        if process.at == "runs":
            stops = process.lost or process.fenced
            yield Step("finish", (), state.p(at="drains", handed=process.handed if stops else "e"))
        if process.at in ("runs", "drains") and not process.fenced and process.acked != process.handed:
            yield from self._append(state)
        if process.at == "drains" and (process.fenced or process.acked == process.handed):
            yield self._decide(state)
        if process.at == "tells":
            yield from self._tell(state)
        if process.at == "releases":
            yield self._simple(state, "release", ("release", "R"), at="removes")
        if process.at == "removes":
            if process.counted or not self.rules.fenced_keeps_deadline:
                yield self._simple(state, "remove the deadline", ("remove", None), at="done")
            else:
                yield Step("leave the deadline", (), state.p(at="done"))

    def _simple(self, state: State, name: str, op: Op, **changes: Any) -> Step:
        after, _ = state.run(op)
        return Step(name, (op,), after.p(**changes))

    def _renew(self, state: State) -> Step:
        op: Op = ("acquire", "R") if state.process.renewal else ("renew", "R")
        after, reply = state.run(op)
        ops: tuple[Op, ...] = (op,)
        if reply == "R":
            after = after.p(held=True)
        elif reply is True:
            after, _ = after.p(renewal="", held=True, proved=False).run(("announce",))
            ops = (op, ("announce",))
        elif reply is None:
            after = after.p(renewal="missing")
        else:
            lost = reply == OTHER or not self.rules.claim_is_undecided
            after = after.p(renewal="", lost=lost)
        return Step(f"{op[0]}: {reply}", ops, after)

    def _append(self, state: State) -> Iterator[Step]:
        process = state.process
        entry = OURS[OURS.index(process.acked) + 1]
        op: Op = ("append", process.acked, entry)
        after, reply = state.run(op)
        if reply == "ok":
            yield Step(f"append {entry}", (op,), self._acked(after, entry))
        elif entry in state.server.stream:
            yield Step(f"{entry} is found", (op, ("read_stream",)), self._acked(after, entry))
        else:
            yield Step("fenced", (op, ("read_stream",)), after.p(fenced=True, sent=False))
        if state.budget.replies:
            spent = state.spend("replies")
            if reply == "ok":
                yield Step(f"append {entry}, reply lost", (op,), after.spend("replies").p(sent=True))
            if not state.late:
                yield Step(f"append {entry} is delayed", (), spent.p(sent=True)._replace(late=(op,)))

    def _acked(self, state: State, entry: str) -> State:
        return state.p(acked=entry, sent=False, proved=state.process.held)

    def _decide(self, state: State) -> Step:
        process = state.process
        own = process.acked == "e"
        if own and (self.rules.own_end_decides or not process.lost):
            confirmed = process.held and process.proved
            return Step("it ended", (), state.p(at="tells", result="e", checking=not confirmed))
        return Step("it was replaced", (), state.p(at="releases", result="l"))

    def _tell(self, state: State) -> Iterator[Step]:
        process = state.process
        if process.checking:
            yield self._check(state)
        elif process.told:
            yield Step("told already", (), state.p(at="releases", counted=True))
        else:
            op: Op = ("add_fact", "e")
            yield self._simple(state, "queue the fact", op, at="releases", counted=True)
            if state.budget.replies:
                yield Step("queue the fact, reply lost", (op,), state.run(op)[0].spend("replies"))

    def _check(self, state: State) -> Step:
        acquired, reply = state.run(("acquire", "R"))
        after, told = acquired.run(("read_facts",))
        return Step(f"check: {reply}, {told}", (("acquire", "R"), ("read_facts",)), after.p(checking=False, told=told))

    # --- the recovery ---

    def _recovery(self, state: State) -> Iterator[Step]:
        recovery, server = state.recovery, state.server
        if recovery.at == "idle":
            if server.deadline:
                op: Op = ("read_live",)
                _, held = state.run(op)
                found = {None: "claims", "R": "idle", "C": "idle", OTHER: "replaced"}[held]
                if found != "idle":
                    yield Step(f"sweep: {held}", (op,), state.r(at=found, seen=server.deadline))
            return
        if state.budget.crashes:
            yield Step("the recovery dies", (), state.spend("crashes")._replace(recovery=Recovery()))
        yield from getattr(self, f"_at_{recovery.at}")(state)

    def _at_claims(self, state: State) -> Iterator[Step]:
        after, taken = state.run(("claim",))
        yield Step(
            f"claim: {taken}", (("claim",),), after.r(at="reads") if taken else after._replace(recovery=Recovery())
        )

    def _at_replaced(self, state: State) -> Iterator[Step]:
        stream = state.server.stream
        ops: tuple[Op, ...] = (("read_stream",), ("read_facts",))
        if self.rules.waits_for_begin and stream.startswith("b") and not ends(stream):
            yield Step("the other has not begun", ops, state._replace(recovery=Recovery()))
            return
        # The old rule did not look at the stream at all.
        seen = stream if self.rules.waits_for_begin else OTHER
        yield Step("replaced", ops, state.r(at="tells", stream=seen, told=bool(state.server.facts)))

    def _at_reads(self, state: State) -> Iterator[Step]:
        yield Step("read the stream", (("read_stream",),), state.r(at="searches", stream=state.server.stream))

    def _at_searches(self, state: State) -> Iterator[Step]:
        told = bool(state.server.facts)
        open_end = state.recovery.stream.startswith("b") and not ends(state.recovery.stream)
        yield Step("read the facts", (("read_facts",),), state.r(at="verifies" if open_end else "tells", told=told))

    def _at_verifies(self, state: State) -> Iterator[Step]:
        ours = state.server.live == "C"
        yield Step(f"verify the claim: {ours}", (("read_live",),), state.r(at="ends" if ours else "gives_up"))

    def _at_ends(self, state: State) -> Iterator[Step]:
        op: Op = ("end_lost", state.recovery.stream[-1])
        after, done = state.run(op)
        stream = state.recovery.stream + LOST
        yield Step(f"end: {done}", (op,), after.r(at="tells", stream=stream) if done else after.r(at="gives_up"))
        if state.budget.replies:
            spent = state.spend("replies")._replace(recovery=Recovery())
            if done:
                yield Step("end, reply lost", (op,), after.spend("replies")._replace(recovery=Recovery()))
            if not state.late:
                yield Step("end is delayed", (), spent._replace(late=(op,)))

    def _at_tells(self, state: State) -> Iterator[Step]:
        outcome = (ends(state.recovery.stream) or "l")[0]
        op: Op = ("add_fact", outcome)
        after = state if state.recovery.told else state.run(op)[0]
        yield Step(f"tell {outcome}", () if state.recovery.told else (op,), after.r(at="removes"))

    def _at_removes(self, state: State) -> Iterator[Step]:
        op: Op = ("remove", state.recovery.seen)
        after, _ = state.run(op)
        yield Step("remove the deadline", (op,), after.r(at="gives_up"))

    def _at_gives_up(self, state: State) -> Iterator[Step]:
        after, _ = state.run(("release", "C"))
        yield Step("release the claim", (("release", "C"),), after._replace(recovery=Recovery()))

    # --- the second run ---

    def _other(self, state: State) -> Iterator[Step]:
        if state.other == "" and state.server.live is None:
            yield self._other_does(state, "acquires", ("acquire", OTHER), "acquired")
        if state.other == "acquired":
            yield self._other_does(state, "begins", ("begin_other",), "begun")
        if state.other in ("acquired", "begun"):
            yield self._other_does(state, "goes", ("release", OTHER), "gone")

    def _other_does(self, state: State, name: str, op: Op, then: str) -> Step:
        after, _ = state.run(op)
        return Step(f"other {name}", (op,), after._replace(other=then))


def ends(stream: str) -> str:
    """Return the ends of the run that a stream shows."""
    return "".join(entry for entry in stream if entry in "el")


def fault(state: State, *, is_last: bool) -> str | None:
    """Return what is wrong with a state, or with one in which nothing happens any more."""
    server, process = state.server, state.process
    restarted = server.stream.startswith(OTHER)
    if len(ends(server.stream)) > 1:
        return "two ends"
    if process.lost and state.other == "":
        return "given up though nobody had replaced it"
    if not server.deadline and not server.facts:
        return "its deadline was removed before its fact was queued"
    if not restarted and not set(server.facts) <= set(ends(server.stream)):
        return "a fact says something else than the stream"
    if not is_last:
        return None
    if not server.facts:
        return "not counted"
    if server.deadline or server.live:
        return "a deadline or a lease is left"
    if restarted:
        return None
    if not ends(server.stream):
        return "no end"
    if process.at == "done" and process.result != ends(server.stream):
        return "the caller was told something else than the stream says"
    return None


def explore(rules: Rules, budget: Budget) -> tuple[int, str | None, list[str]]:
    """Visit every reachable state; returns their number, and the first fault with the steps that lead to it.

    From every state one must be reachable in which nothing happens any more: else something goes on for ever.
    """
    model, start = Model(rules), State(budget=budget)
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    before: dict[State, list[State]] = {}
    last: list[State] = []
    queue = deque([start])
    while queue:
        state = queue.popleft()
        steps = [step for step in model.steps(state) if step.state != state]
        if not steps:
            last.append(state)
        if (wrong := fault(state, is_last=not steps)) is not None:
            return len(came_from), wrong, _trace(came_from, state)
        for step in steps:
            before.setdefault(step.state, []).append(state)
            if step.state not in came_from:
                came_from[step.state] = (state, step.name)
                queue.append(step.state)
    comes_to_rest = set(last)
    while last:
        for state in before.get(last.pop(), ()):
            if state not in comes_to_rest:
                comes_to_rest.add(state)
                last.append(state)
    if restless := next((state for state in came_from if state not in comes_to_rest), None):
        return len(came_from), "it never comes to rest", _trace(came_from, restless)
    return len(came_from), None, []


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names: list[str] = []
    while (came := came_from[state]) is not None:
        state, name = came
        names.insert(0, name)
    return names
