"""A job: the description of a run, as JSON, in the jobs queue and in the run's first checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from pydantic_core import from_json, to_json

from ..errors import JobError

if TYPE_CHECKING:
    from pydantic_ai.messages import UserContent

FORMAT = 1  # goes up when an older worker could misread a newer job
MAX_ARGS = 65_536  # bytes
MAX_RECOVER = 86_400  # seconds: a live stream expires after that
_MAX_AGENT = 200  # characters, as for ids


class UnreadableJobError(ValueError):
    """A job that this version should be able to read, and cannot."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run that any process with the agent's recipe can start or resume.

    Args:
        run_id: the run's id; a job submitted twice under one id runs once.
        scope_id: the tenant.
        user_id: the user.
        session_id: the conversation.
        agent: name of the recipe that makes the agent.
        prompt: what the user asked; None continues the conversation as it is stored.
        args: the caller's arguments for the recipe; JSON values.
        recover: seconds after the death of its process during which the run may be resumed.
        max_attempts: attempts in a row without progress after which the run is lost.
        results: approvals and results of deferred calls with which the run goes on, as pydantic-ai's JSON.
        goes_on_from: fingerprint of the stored messages that the run goes on from; None: all of them.
        submitted_ms: server time of `submit()`; 0 where nobody submitted the run.
        attempt: which attempt this is, from 1.
    """

    run_id: str
    scope_id: str
    user_id: str
    session_id: str
    agent: str
    prompt: str | Sequence[UserContent] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    recover: float = 60.0
    max_attempts: int = 3
    results: dict[str, Any] | None = None
    submitted_ms: int = 0
    attempt: int = 1
    goes_on_from: str | None = None

    def encode(self) -> bytes:
        """Return the job as JSON.

        Raises:
            JobError: a field is not what a worker could read.
        """
        if not isinstance(self.agent, str) or not 0 < len(self.agent) <= _MAX_AGENT:
            raise JobError(f"the agent's name must be a str of 1 to {_MAX_AGENT} characters, not {self.agent!r:.40}")
        if not _is_number(self.recover) or not 0 <= self.recover <= MAX_RECOVER:
            raise JobError(f"recover must be from 0 to {MAX_RECOVER} seconds, not {self.recover!r:.40}")
        if not _is_number(self.max_attempts) or isinstance(self.max_attempts, float) or self.max_attempts < 1:
            raise JobError(f"max_attempts must be an int of at least 1, not {self.max_attempts!r:.40}")
        fields = (
            {
                "v": FORMAT,
                "run_id": self.run_id,
                "ids": (self.scope_id, self.user_id, self.session_id),
                "agent": self.agent,
                "prompt": _dump_prompt(self.prompt),
                "args": orjson.Fragment(_dump_args(self.args)),
                "recover": self.recover,
                "max_attempts": self.max_attempts,
                "submitted_ms": self.submitted_ms,
            }
            | ({} if self.results is None else {"results": orjson.Fragment(to_json(self.results))})
            | ({} if self.goes_on_from is None else {"goes_on_from": self.goes_on_from})
        )
        try:
            return orjson.dumps(fields)
        except TypeError as error:  # a lone surrogate, an integer beyond 64 bits
            raise JobError(f"agent, prompt and max_attempts must be JSON values ({error})") from None


def decode(data: bytes) -> Job:
    """Parse a job.

    Raises:
        UnreadableJobError: it is no job of this version.
    """
    try:
        fields = from_json(data)  # orjson makes floats of integers beyond 64 bits, which results may have
        if int(fields["v"]) > FORMAT:
            raise UnreadableJobError(f"format {fields['v']} is newer than {FORMAT}: update this worker")
        scope_id, user_id, session_id = map(str, fields["ids"])
        return Job(
            run_id=str(fields["run_id"]),
            scope_id=scope_id,
            user_id=user_id,
            session_id=session_id,
            agent=str(fields["agent"]),
            prompt=_load_prompt(fields["prompt"]),
            args=dict(fields["args"]),
            recover=float(fields["recover"]),
            max_attempts=int(fields["max_attempts"]),
            results=None if (results := fields.get("results")) is None else dict(results),
            submitted_ms=int(fields["submitted_ms"]),
            goes_on_from=None if (known := fields.get("goes_on_from")) is None else str(known),
        )
    except UnreadableJobError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # The exception's text may quote the prompt.
        raise UnreadableJobError(type(error).__name__) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dump_args(args: object) -> bytes:
    if not isinstance(args, dict):
        raise JobError(f"args must be a dict of JSON values, not {type(args).__name__}")
    try:
        data = orjson.dumps(args)
        json.dumps(args, allow_nan=False, default=str)  # orjson writes NaN as null
    except (TypeError, ValueError) as error:
        raise JobError(f"args must be JSON values ({error}): pass ids, and load objects in the recipe") from None
    if len(data) > MAX_ARGS:
        raise JobError(f"args must be at most {MAX_ARGS} bytes of JSON, not {len(data)}: pass ids instead")
    return data


def _dump_prompt(prompt: object) -> Any:
    if prompt is None or isinstance(prompt, str):
        return None if prompt is None else prompt.encode("utf-8", "replace").decode()
    if not isinstance(prompt, list | tuple):
        raise JobError(f"prompt must be a str, a list of user content or None, not {type(prompt).__name__}")
    adapter = _prompt_adapter()
    try:
        return adapter.dump_python(adapter.validate_python(list(prompt)), mode="json")
    except ValueError as error:  # its text may quote the prompt
        raise JobError(f"prompt must be a list of user content ({type(error).__name__})") from None


def _load_prompt(plain: Any) -> str | Sequence[UserContent] | None:
    if plain is None or isinstance(plain, str):
        return plain
    content: Sequence[UserContent] = _prompt_adapter().validate_python(plain)
    return content


def _prompt_adapter() -> Any:
    # Only a prompt with files needs pydantic-ai, whose import takes a second.
    from pydantic import TypeAdapter  # noqa: PLC0415
    from pydantic_ai.messages import UserContent  # noqa: PLC0415

    return TypeAdapter(list[UserContent])
