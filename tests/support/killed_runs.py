"""Kills a run in memory at a chosen point, and goes on with what its checkpoints hold; only the stream is a fake.

A point is a moment before or after an append, a wait for acknowledgements, or a call of `Points.reach()` in a model
or a tool. The driver, the capability, the recorder and the checkpoints are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelRequest
from pydantic_ai.usage import RunUsage

import agx
from agx.checkpoints.job import Job
from agx.control.inbox import Inbox
from agx.engine.registry import current_engine
from agx.facts.schema import StreamTotals
from agx.recovery.dead_run import DeadRun
from agx.redis.keys import SessionKeys
from agx.runs.drive import Drive
from agx.runs.opening import open_observed
from agx.stream.entry import When

from .agents import ScopeDeps

_CHANGES = {"timestamp", "run_id", "conversation_id"}  # from run to run


class KilledError(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@dataclass
class Points:
    """The points that a run reaches, and when it is killed.

    Args:
        kill_at: number of the point at which it is killed.
        kill_after_checkpoints: how many checkpoints its stream has when it is killed.
    """

    kill_at: int | None = None
    kill_after_checkpoints: int | None = None
    names: list[str] = field(default_factory=list)
    killed: bool = False

    def reach(self, name: str) -> None:
        if self.killed:
            raise KilledError
        self.names.append(name)
        if self.kill_at is not None and len(self.names) > self.kill_at:
            self.kill()

    def kill(self) -> None:
        self.killed = True
        raise KilledError


@dataclass
class Ledger:
    """What models and tools did: kept over attempts, and taken down before the run's own code goes on."""

    points: Points = field(default_factory=Points)
    calls: list[str] = field(default_factory=list)

    def add(self, call: str) -> None:
        """A model request or a tool call begins."""
        self.points.reach(f"before {call}")
        self.calls.append(call)
        self.points.reach(f"in {call}")


@dataclass
class Stream:
    """The checkpoints of a run, as its stream holds them after a kill.

    Args:
        eager: each entry is stored at once; otherwise only a wait stores them, and a kill loses the others.
    """

    eager: bool
    checkpoints: list[bytes] = field(default_factory=list)
    responses: int = 0  # recorded
    returned: list[str] = field(default_factory=list)  # ids of tool calls with a recorded result
    stored_prompt: bytes | None = None


@dataclass
class _Writer:
    """A stream's writer, as far as the recording of a run uses it."""

    stream: Stream
    points: Points
    totals: StreamTotals = field(default_factory=StreamTotals)
    _waiting: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)

    def put(self, type: str, origin: str, body: dict[str, Any], *, when: When, checkpoint: bytes | None = None) -> None:
        if checkpoint is None or self.points.killed:
            return
        name = f"{body['event']} {body.get('tool_call_id', body['idx'])}"
        self.points.reach(f"before {name}")
        self._waiting.append((body, checkpoint))
        if self.stream.eager:
            self._store()
        if len(self.stream.checkpoints) == self.points.kill_after_checkpoints:
            self.points.kill()
        self.points.reach(f"after {name}")

    def put_delta(self, origin: str, part: Any, text: str, *, is_first: bool) -> None:
        self.points.reach("delta")

    async def drain(self) -> None:
        self.points.reach("before a wait")
        self._store()
        self.points.reach("after a wait")

    def _store(self) -> None:
        for body, checkpoint in self._waiting:
            self.stream.checkpoints.append(checkpoint)
            self.stream.responses += body["event"] == "llm-end"
            if body.get("part_kind") == "tool-return":
                self.stream.returned.append(body["tool_call_id"])
        self._waiting.clear()


@dataclass(kw_only=True)
class StoredSession(agx.Session):
    """A conversation that is stored as JSON."""

    stored: list[ModelMessage]
    stream: Stream

    async def load(self) -> None:
        prompt = (
            []
            if self.stream.stored_prompt is None
            else ModelMessagesTypeAdapter.validate_json(self.stream.stored_prompt)
        )
        stored = ModelMessagesTypeAdapter.validate_json(ModelMessagesTypeAdapter.dump_json(self.stored))
        self.msgs = [*stored, *prompt]

    async def begin(self, request: ModelRequest) -> None:
        self.stream.stored_prompt = ModelMessagesTypeAdapter.dump_json([request])

    async def save(self) -> None: ...


@dataclass(frozen=True)
class Scenario:
    """A run that is to be killed.

    Args:
        make_agent: makes the agent, whose models and tools take their calls down in the ledger.
        make_kwargs: what `agent.run()` gets beside the prompt; made anew for each attempt, as a recipe does.
        stored: the conversation of earlier turns.
    """

    make_agent: Callable[[Ledger], Agent[ScopeDeps, Any]]
    prompt: Any = "hello"
    make_kwargs: Callable[[], dict[str, Any]] = dict
    stored: tuple[ModelMessage, ...] = ()


@dataclass
class Ended:
    """How a run ended: what is equal in two runs that did the same."""

    messages: list[Any]
    output: Any
    usage: RunUsage


async def attempt(
    scenario: Scenario, ledger: Ledger, stream: Stream, *, first: bool, is_steered: bool = False
) -> Ended:
    """Drive a run from where its checkpoints are, to its end; with `is_steered` it has the session's inbox.

    Raises:
        KilledError: it reached the point at which it is killed.
    """
    engine = current_engine()
    await engine.ready()
    life = open_observed(engine, "killed", "1")
    engine.runs.discard(life)
    keys = SessionKeys.of(engine.config.key_prefix, 1, 1, "s")
    life.recorder.session = keys
    life.recorder.events.writer = cast("Any", _Writer(stream, ledger.points))
    if is_steered:
        life.recorder.steered.inbox = Inbox(engine.control, keys)
        life.recorder.steered.look()
    job = Job("r", "1", "1", "s", "killed", scenario.prompt)
    dead = None if first else DeadRun(keys, job, cast("Any", None), (1, 0), tuple(stream.checkpoints), None, 0)
    session = StoredSession(stored=list(scenario.stored), stream=stream)
    drive = Drive(life, session, dead=dead, job=job)
    await drive.run_agent(scenario.make_agent(ledger), scenario.prompt, ScopeDeps(), scenario.make_kwargs())
    assert drive.result is not None
    messages = ModelMessagesTypeAdapter.dump_python(drive.session.msgs, mode="json")
    return Ended(_without_changes(messages), drive.result.output, drive.result.usage)


def _without_changes(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {name: _without_changes(item) for name, item in value.items() if name not in _CHANGES}
        if plain.get("kind") == "request":
            # pydantic-ai puts tool results first when it loads a history, enqueued content behind all of them.
            plain["parts"].sort(key=lambda part: part["part_kind"] != "tool-return")
        return plain
    return [_without_changes(item) for item in value] if isinstance(value, list) else value
