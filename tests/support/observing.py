"""Drives an agent in each way that pydantic-ai has, without agx, observed and streamed, and returns what came of it."""

from __future__ import annotations

import asyncio
import re
import threading
import warnings
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_ai import Agent, AgentRunResultEvent
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import (
    FinishReason,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelResponse,
    ModelResponseStreamEvent,
    TextPart,
    ToolCallPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import RequestUsage

import agx

Reply = Sequence[str | ToolCallPart | Exception]  # an exception is raised at its place


@dataclass
class Probe:
    """What the models and the users' hooks of one run saw."""

    requests: Counter[str] = field(default_factory=Counter)
    hooks: list[tuple[str, object]] = field(default_factory=list)


class ScriptedModel(Model):
    """A model that gives the same replies to both kinds of request, and counts them."""

    def __init__(
        self,
        probe: Probe,
        *replies: Reply,
        name: str = "first",
        finish: FinishReason | None = "stop",
        details: dict[str, int] | None = None,
    ) -> None:
        super().__init__(profile=ModelProfile(supports_json_schema_output=True))
        self._probe = probe
        self._replies = list(replies)
        self._name = name
        self._finish = finish
        self._details = details or {}

    @property
    def model_name(self) -> str:
        return self._name

    @property
    def system(self) -> str:
        return f"provider-of-{self._name}"

    def next_reply(self) -> Reply:
        self._probe.requests[self._name] += 1
        return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]

    async def request(
        self, messages: list[ModelMessage], model_settings: ModelSettings | None, parameters: ModelRequestParameters
    ) -> ModelResponse:
        self.prepare_request(model_settings, parameters)
        parts: list[TextPart | ToolCallPart] = []
        for piece in self.next_reply():
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, str) and parts and isinstance(parts[-1], TextPart):
                parts[-1].content += piece
            else:
                parts.append(TextPart(piece) if isinstance(piece, str) else piece)
        return ModelResponse(
            parts,
            usage=self.usage(),
            model_name=self._name,
            provider_name=self.system,
            finish_reason=self._finish,
        )

    def usage(self) -> RequestUsage:
        return RequestUsage(input_tokens=7, output_tokens=5, details=dict(self._details))

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: Any = None,
    ) -> AsyncGenerator[StreamedResponse]:
        _, parameters = self.prepare_request(model_settings, model_request_parameters)
        reply = self.next_reply()
        if isinstance(reply[0], Exception):
            raise reply[0]
        yield _Streamed(parameters, model=self, reply=reply, finish=self._finish)


@dataclass
class _Streamed(StreamedResponse):
    model: ScriptedModel
    reply: Reply
    finish: FinishReason | None

    async def _get_event_iterator(self) -> AsyncIterator[ModelResponseStreamEvent]:
        for n, piece in enumerate(self.reply):
            await asyncio.sleep(0)
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, str):
                for event in self._parts_manager.handle_text_delta(vendor_part_id="text", content=piece):
                    yield event
            else:
                yield self._parts_manager.handle_tool_call_part(
                    vendor_part_id=n, tool_name=piece.tool_name, args=piece.args, tool_call_id=piece.tool_call_id
                )
        self._usage = self.model.usage()
        self.finish_reason = self.finish

    async def close_stream(self) -> None:
        pass

    @property
    def model_name(self) -> str:
        return self.model.model_name

    @property
    def provider_name(self) -> str:
        return self.model.system

    @property
    def provider_url(self) -> None:
        return None

    @property
    def timestamp(self) -> datetime:
        return datetime.now(tz=UTC)


@dataclass
class Outcome:
    """What a caller gets from a run, without times and ids."""

    output: str | None = None
    error: tuple[str, str] | None = None
    messages: list[Any] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=dict)
    hooks: list[tuple[str, object]] = field(default_factory=list)


Made = Agent[None, Any]
Make = Callable[[Probe, list[AbstractCapability[Any]]], Made]


async def _run(agent: Made, outcome: Outcome) -> None:
    _note(outcome, await agent.run("hi"))


async def _run_sync(agent: Made, outcome: Outcome) -> None:
    """In a thread, whose loop gets connections of its own."""

    def drive() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            _note(outcome, agent.run_sync("hi"))
        except Exception as error:
            errors.append(error)
        finally:
            loop.run_until_complete(agx.aclose())
            asyncio.set_event_loop(None)
            loop.close()

    errors: list[Exception] = []
    thread = threading.Thread(target=drive)
    thread.start()
    await asyncio.to_thread(thread.join)
    if errors:
        raise errors[0]


async def _run_stream(agent: Made, outcome: Outcome) -> None:
    async with agent.run_stream("hi") as streamed:
        outcome.output = repr(await streamed.get_output())
        outcome.messages, outcome.usage = _plain(streamed.all_messages()), _usage(streamed)


async def _run_stream_events(agent: Made, outcome: Outcome) -> None:
    async with agent.run_stream_events("hi") as events:
        async for event in events:
            if isinstance(event, AgentRunResultEvent):
                _note(outcome, event.result)


async def _iter(agent: Made, outcome: Outcome) -> None:
    async with agent.iter("hi") as run:
        async for _ in run:
            pass
    assert run.result is not None
    _note(outcome, run.result)


ENTRY_POINTS: dict[str, Callable[[Made, Outcome], Awaitable[None]]] = {
    "run": _run,
    "run_sync": _run_sync,
    "run_stream": _run_stream,
    "run_stream_events": _run_stream_events,
    "iter": _iter,
}


def _note(outcome: Outcome, result: Any) -> None:
    outcome.output = repr(result.output)
    outcome.messages, outcome.usage = _plain(result.all_messages()), _usage(result)


def _usage(result: Any) -> dict[str, Any]:
    usage = result.usage() if callable(result.usage) else result.usage
    return {name: value for name, value in vars(usage).items() if value}


def _plain(messages: list[ModelMessage]) -> list[Any]:
    return [_without_times(message) for message in ModelMessagesTypeAdapter.dump_python(messages, mode="json")]


_TIMES_AND_IDS = {"timestamp", "duration", "run_id", "conversation_id", "history_digest"}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if name not in _TIMES_AND_IDS}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


async def outcome_of(entry: str, make: Make, capability: AbstractCapability[Any] | None) -> Outcome:
    """Run a fresh agent once and return what came of it."""
    outcome, probe = Outcome(), Probe()
    agent = make(probe, [] if capability is None else [capability])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            await ENTRY_POINTS[entry](agent, outcome)
        except Exception as error:
            outcome.error = (type(error).__name__, _text_of(error))
    outcome.warnings = [str(warning.message) for warning in caught]
    outcome.requests, outcome.hooks = dict(probe.requests), probe.hooks
    return outcome


def _text_of(error: BaseException) -> str:
    inner = getattr(error, "exceptions", ())
    text = str(error) + "".join(f" / {type(e).__name__} {_text_of(e)}" for e in inner)
    return re.sub(r'"(timestamp|run_id|conversation_id|history_digest)": "[^"]*"', r'"\1": ""', text)
