"""A conversation as a page that has just been opened needs it: what is stored, and what is being answered."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, UserPromptPart
from redis.exceptions import RedisError

from ..checkpoints.job import UnreadableJobError, decode
from ..engine.registry import current_engine
from ..errors import RedisUnavailableError
from ..redis.entry_id import format_id
from ..redis.keys import SessionKeys
from ..runs.drive import is_prompt
from ..sessions.base import Session, SessionStore
from ..sessions.lost_answer import read_lost_answer
from ..stream.entry import PROMPT, Body, StreamEntry
from .runs import Who
from .turns import Prompt, close_calls, end_of_prompt

# Of what is sent to the model; the rest are instructions of many kinds.
_SHOWN = frozenset({"user-prompt", "tool-return", "retry-prompt"})
_HEAD = 8  # entries among which the prompt is: after `begin`, others may have added a few


@dataclass(frozen=True, slots=True)
class Asked:
    """How a router started a run: its prompt, if it has one, and after how many messages it goes on."""

    prompt: str | None
    after: int
    stamp: str  # pydantic-ai's id of the run


@dataclass(frozen=True, slots=True)
class LatestRun:
    """The run that a session's stream holds."""

    run_id: str
    live: bool
    outcome: str | None  # lost: its process died, and no sidecar has ended it yet; None while it is live
    reason: str | None
    last_event_id: str
    asked: Asked | None  # None where no router started it
    job_prompt: Prompt | None  # of a run that workers can resume


async def read_latest_run(who: Who, session_id: str) -> LatestRun | None:
    """Return the run that is kept, live or ended; raises RedisUnavailableError."""
    engine = current_engine()
    session = SessionKeys.of(engine.config.key_prefix, who.scope_id, who.user_id, session_id)
    bus = engine.control
    head = bus.execute("XRANGE", session.stream, "-", "+", "COUNT", _HEAD)
    last = bus.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
    lease = bus.execute("EXISTS", session.live)
    try:
        entries = [StreamEntry.of(*entry) for entry in await head]
        latest = [StreamEntry.of(*entry) for entry in await last]
        end = next((entry for entry in latest if entry.type == "end"), None)
        live = end is None and (bool(await lease) or await engine.is_recoverable(session))
    except (RedisError, OSError) as error:
        raise RedisUnavailableError("look at the session", error) from error
    if not entries or not latest or entries[0].type != "begin":
        return None
    # The last one is that of the attempt that began: a process may have died right before.
    asked = next((asked for entry in reversed(entries) if (asked := _read_asked(entry)) is not None), None)
    ending: Body = {} if live else {"outcome": "lost"} if end is None else end.body
    return LatestRun(
        run_id=str(entries[0].body.get("run_id")),
        live=live,
        outcome=_text(ending.get("outcome")),
        reason=_text(ending.get("reason")),
        last_event_id=format_id(latest[0].id),
        asked=asked,
        job_prompt=_read_job_prompt(entries[0]),
    )


@dataclass(frozen=True, slots=True)
class Conversation:
    """A loaded session as its user may see it, with the prompt that is being answered and therefore not yet saved."""

    session: Session
    latest: LatestRun | None
    live: bool  # the latest run is under way, and its messages are not yet among the session's
    asked: list[ModelMessage]  # what the latest run goes on from, its prompt included; empty where no router started it
    lost: str | None  # the last prompt, where its run has ended and the store does not have it

    @property
    def opening(self) -> list[ModelMessage]:
        """What the latest run's answer begins with, where it goes on with decided calls."""
        return self.asked[end_of_prompt(self.asked) :]

    @property
    def run_id(self) -> str | None:
        return None if self.latest is None else self.latest.run_id

    @property
    def outcome(self) -> str | None:
        """How the latest run ended; None while it is live, or where its events are no longer retained."""
        return None if self.latest is None or self.live else self.latest.outcome

    def describe_last_answer(self) -> Body:
        """Return how the last answer ended, and what it took."""
        return self._describe(self.session.msgs[end_of_prompt(self.session.msgs) :], is_last=True)

    def described_messages(self) -> list[ModelMessage]:
        """Return the messages, each response with the description of its answer under `agx` in its metadata."""
        described: list[ModelMessage] = []
        for is_answer, group in groupby(self.session.msgs, key=lambda message: not _is_prompt(message)):
            messages = list(group)
            is_last = messages[-1] is self.session.msgs[-1]
            metadata = {"agx": self._describe(messages, is_last=is_last)} if is_answer else {}
            described += [
                replace(message, metadata={**(message.metadata or {}), **metadata})
                if isinstance(message, ModelResponse)
                else message
                for message in messages
            ]
        return described

    def _describe(self, answer: list[ModelMessage], *, is_last: bool) -> Body:
        responses = [message for message in answer if isinstance(message, ModelResponse)]
        # Of an earlier run it is no longer known why its answer is incomplete.
        outcome = "interrupted" if responses and responses[-1].state == "interrupted" else "completed"
        reason = None
        if is_last and self.latest is not None:
            outcome, reason = self.outcome or outcome, self.latest.reason
        costs = [response.usage.cost for response in responses if response.usage.cost is not None]
        return {
            "outcome": outcome,
            "reason": reason,
            "input_tokens": sum(response.usage.input_tokens for response in responses),
            "output_tokens": sum(response.usage.output_tokens for response in responses),
            "cost_usd": float(sum(costs)) if costs else None,
        }


async def read_conversation(sessions: SessionStore, who: Who, session_id: str) -> Conversation:
    """Load a session and look at its latest run; raises RedisUnavailableError, and what the store raises."""
    # First the run: of one that ends meanwhile everything is either stored or still on its stream.
    latest = await read_latest_run(who, session_id)
    session = sessions.open(who.scope_id, who.user_id, session_id)
    await session.load()
    live = latest is not None and latest.live
    asked: list[ModelMessage] = []
    lost: str | None = None
    if latest is not None and latest.asked is not None:
        prompt = latest.asked.prompt
        asked = session.msgs[: latest.asked.after]
        if prompt is not None:
            asked.append(ModelRequest(parts=[UserPromptPart(prompt)]))
        if any(message.run_id == latest.asked.stamp for message in session.msgs):
            live = False
        elif live or prompt is not None:
            is_stored = end_of_prompt(session.msgs) > latest.asked.after  # by the session's `begin()`
            session.msgs = list(asked)
            if not live:
                session.msgs += await read_lost_answer(who.scope_id, who.user_id, session_id)
                lost = None if is_stored else prompt
    elif live and latest is not None and await _is_to_be_stored(session, latest, who, session_id):
        assert latest.job_prompt is not None
        session.msgs.append(ModelRequest(parts=[UserPromptPart(latest.job_prompt)]))
    session.msgs = _show(session.msgs)
    return Conversation(session, latest, live, _show(asked), lost)


def count_stored(messages: Sequence[ModelMessage], shown: int) -> int:
    """Return how many stored messages give a page's first `shown` ones; if a page has fewer, one more than all."""
    if shown > len(_show(messages)):
        return len(messages) + 1
    return bisect_right(range(len(messages) + 1), shown, key=lambda count: len(_show(messages[:count]))) - 1


def _show(messages: Sequence[ModelMessage]) -> list[ModelMessage]:
    return _without_instructions(close_calls(messages))


async def _is_to_be_stored(session: Session, latest: LatestRun, who: Who, session_id: str) -> bool:
    """Return whether a worker has begun the run and not yet stored its prompt."""
    if latest.job_prompt is None or is_prompt(session.msgs[-1:], latest.job_prompt):
        return False
    now = await read_latest_run(who, session_id)  # a run that has ended meanwhile has stored it
    return now is not None and now.live and now.run_id == latest.run_id


def _read_asked(entry: StreamEntry) -> Asked | None:
    """Return what a router's run has put on its stream; None for any other entry, which may be anybody's."""
    if entry.origin != PROMPT or entry.is_users:
        return None
    body = entry.body
    prompt, after, stamp = body.get("prompt"), body.get("after"), body.get("stamp")
    if isinstance(prompt, str | None) and isinstance(after, int) and isinstance(stamp, str):
        return Asked(prompt, after, stamp)
    return None  # a steered prompt has no stamp


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _is_prompt(message: ModelMessage) -> bool:
    return isinstance(message, ModelRequest) and any(isinstance(part, UserPromptPart) for part in message.parts)


def _read_job_prompt(begin: StreamEntry) -> Prompt | None:
    try:
        return None if begin.checkpoint is None else decode(begin.checkpoint).prompt
    except UnreadableJobError:
        return None


def _without_instructions(messages: list[ModelMessage]) -> list[ModelMessage]:
    """Leave out the agent's instructions: they are not for the browser."""
    shown: list[ModelMessage] = []
    for message in messages:
        if isinstance(message, ModelRequest):
            parts = [part for part in message.parts if part.part_kind in _SHOWN]
            if parts:
                shown.append(replace(message, parts=parts, instructions=None))
        else:
            shown.append(message)
    return shown
