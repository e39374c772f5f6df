"""The demo's agents: their tools, and the scripted model that answers at the pace of a real one."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.capabilities.abstract import WrapModelRequestHandler
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.function import (
    AgentInfo,
    BuiltinToolCallsReturns,
    DeltaThinkingCalls,
    DeltaThinkingPart,
    DeltaToolCall,
    DeltaToolCalls,
    FunctionModel,
)

from ..facts.schema import ToolOutcome
from ..runs.deps import Deps
from .scenarios import Scenario, Turn

Delta = str | DeltaToolCalls | DeltaThinkingCalls | BuiltinToolCallsReturns

_REFUND_LIMIT = 100_000  # cents


@dataclass(kw_only=True)
class DemoDeps(Deps):
    """The tools' dependencies. They record model requests and the outcome of each tool call, independently of agx."""

    scope_id: str
    model_requests: int = 0
    tool_calls: Counter[tuple[str, ToolOutcome]] = field(default_factory=Counter)

    def get_scope_id(self) -> str:
        return self.scope_id


class RefundDeclinedError(Exception):
    """Raised by the refund tool: the run fails with it."""


class _RequestCount(AbstractCapability[DemoDeps]):
    """Counts model requests in the hook in which agx does: one that is cancelled before it is sent counts too."""

    async def wrap_model_request(
        self, ctx: RunContext[DemoDeps], *, request_context: ModelRequestContext, handler: WrapModelRequestHandler
    ) -> ModelResponse:
        ctx.deps.model_requests += 1
        return await handler(request_context)


def _make_agent(name: str, instructions: str) -> Agent[DemoDeps, str]:
    return Agent(deps_type=DemoDeps, name=name, instructions=instructions, capabilities=[_RequestCount()])


travel = _make_agent("travel", "You plan short trips. Look up weather and hours first.")
support = _make_agent("support", "You help with orders. Look an order up before all.")
analyst = _make_agent("analyst", "You answer questions about sales. Query first.")
AGENTS = {"travel": travel, "support": support, "analyst": analyst}


@travel.tool
async def weather(ctx: RunContext[DemoDeps], city: str, day: str) -> dict[str, str | int]:
    """Return the weather of a city on a day."""
    with _recorded(ctx):
        await _work(0.5)
        return {"city": city, "day": day, "sky": "sunny", "celsius": 19}


@travel.tool
async def opening_hours(ctx: RunContext[DemoDeps], place: str) -> str:
    """Return when a place is open."""
    with _recorded(ctx):
        await _work(0.9)
        return f"{place}: 11-19, closed on Tuesdays"


@support.tool(retries=2)
async def look_up_order(ctx: RunContext[DemoDeps], order: str) -> dict[str, str | int]:
    """Return an order by its number, which begins with A-."""
    with _recorded(ctx):
        await _work(0.4)
        if not order.startswith("A-"):
            raise ModelRetry(f"no order {order}: did you mean A-{order}?")
        return {"order": order, "item": "desk lamp", "status": "delivered"}


@support.tool
async def refund(ctx: RunContext[DemoDeps], order: str, cents: int) -> str:
    """Pay an amount back."""
    with _recorded(ctx):
        await _work(0.6)
        if cents > _REFUND_LIMIT:
            raise RefundDeclinedError(f"{cents} cents are above the limit of {_REFUND_LIMIT}")
        return f"refunded {cents} cents of {order}"


@analyst.tool
async def query(ctx: RunContext[DemoDeps], sql: str) -> list[dict[str, str | int]]:
    """Run a read-only query on the sales database."""
    with _recorded(ctx):
        await _work(1.2)
        if "every_sale_there_ever_was" in sql:
            await _work(60)
        return [{"product": "espresso machine", "growth": 41}, {"product": "grinder", "growth": 12}]


@contextmanager
def _recorded(ctx: RunContext[DemoDeps]) -> Iterator[None]:
    outcome: ToolOutcome = "error"
    try:
        yield
        outcome = "ok"
    except ModelRetry:
        outcome = "retry"
        raise
    except asyncio.CancelledError:
        outcome = "cancelled"
        raise
    finally:
        ctx.deps.tool_calls[ctx.tool_name or "", outcome] += 1


class ScriptedModel(FunctionModel):
    """Gives the answers of one scenario, each after the one before in the conversation."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(stream_function=self._play, model_name="scripted-1")
        self._turns = scenario.turns

    async def _play(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Delta]:
        turn = self._turns[sum(isinstance(message, ModelResponse) for message in messages)]
        await _work(0.5)
        if turn.overloaded:
            raise ModelHTTPError(529, self.model_name, {"error": "overloaded"})
        for delta in _deltas(turn):
            yield delta
            await _work(0.035)
        if turn.silent_after:
            await asyncio.Event().wait()


def _deltas(turn: Turn) -> Iterator[Delta]:
    for word in _words(turn.thinking):
        yield {0: DeltaThinkingPart(content=word)}
    yield from _words(turn.text)
    for i, call in enumerate(turn.calls, start=1):
        yield {i: DeltaToolCall(name=call.tool, tool_call_id=f"call_{random.getrandbits(48):012x}")}
        for piece in re.findall(r".{1,12}", json.dumps(call.args)):
            yield {i: DeltaToolCall(json_args=piece)}


def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text)


async def _work(seconds: float) -> None:
    """Take about this long, with some variation."""
    await asyncio.sleep(seconds * random.uniform(0.6, 1.4))
