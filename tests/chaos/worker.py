"""A service to be killed: it runs agents all the time, and records the result of each."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

import agx

from .clients import open_client
from .plan import Plan, plan_of, scope_of, slowed

SERVICE = "chaos"
USER = "u"
USUAL_SLOTS = 8  # runs at a time; with more of them each is slower
_EXPORT_EVERY = 200  # ms
_PAUSE_AFTER_FAILURE = 0.2  # seconds before a slot tries again to start a run


@dataclass(kw_only=True)
class ChaosDeps(agx.Deps):
    scope: str

    def get_scope_id(self) -> str:
        return self.scope


@dataclass
class CountedSession(agx.Session):
    saves: int = 0

    async def load(self) -> None:
        pass

    async def save(self) -> None:
        self.saves += 1


class Ledger:
    """Lines that are in the file when `write()` returns, however the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, session: str, event: str, what: str = "") -> None:
        os.write(self._file, orjson.dumps({"session": session, "event": event, "what": what}) + b"\n")


def make_agent(plan: Plan) -> Agent[ChaosDeps, str]:
    """Return an agent that goes by a plan."""

    async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        asked_before = any(isinstance(message, ModelResponse) for message in messages)
        if plan.calls_tool and not asked_before:
            yield {0: DeltaToolCall(name="work", json_args="{}", tool_call_id="call-1")}
            return
        for n in range(plan.words):
            yield f"{n} "
            await asyncio.sleep(plan.pause)

    agent: Agent[ChaosDeps, str] = Agent(FunctionModel(stream_function=speak), deps_type=ChaosDeps, name="chaotic")

    @agent.tool
    async def work(ctx: RunContext[ChaosDeps]) -> str:
        """Work."""
        await asyncio.sleep(plan.tool_takes)
        return "worked"

    return agent


async def run_one(ledger: Ledger, name: str, slowness: float) -> bool:
    """Run one session; returns whether it could be started."""
    plan, session = slowed(plan_of(name), slowness), CountedSession()
    ledger.write(name, "entered")
    try:
        deps = ChaosDeps(scope=scope_of(name), user_id=USER, session_id=name)
        result = await agx.run(session, make_agent(plan), "Go", deps=deps)
    except agx.RedisUnavailableError as error:
        ledger.write(name, "unavailable", str(error))
        return False
    except agx.AgxCanceledError:
        ledger.write(name, "cancelled")
    except agx.LeaseLostError:
        ledger.write(name, "fenced")
        return True
    except Exception as error:
        ledger.write(name, "failed", f"{type(error).__name__}: {error}")
        return True
    else:
        ledger.write(name, "completed" if result.output == plan.text else "wrong")
    if session.saves != 1:
        ledger.write(name, "unsaved")
    return True


async def _serve(url: str, path: Path, name: str, slots: int, lease_ttl: float) -> None:
    """Keep so many runs going until SIGTERM, then let them end."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client, ledger = open_client(url), Ledger(path)
    agx.configure(agx.Config(redis=client, lease_ttl=lease_ttl, service_name=SERVICE))

    async def work(slot: int) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            if not await run_one(ledger, f"{name}-{slot}-{n}", slots / USUAL_SLOTS):
                await asyncio.sleep(_PAUSE_AFTER_FAILURE)

    await asyncio.gather(*(work(slot) for slot in range(slots)))
    await agx.aclose(grace=60)
    await client.aclose()
    ledger.write("", "left")


def open_sdk(endpoint: str) -> Callable[[], None]:
    """Install an SDK as a service has it, and return what shuts it down."""
    provider = TracerProvider(resource=Resource({"service.name": SERVICE}))
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def work(url: str, ledger: Path, name: str, slots: int, lease_ttl: float, endpoint: str | None) -> None:
    """Run agents until SIGTERM.

    Args:
        slots: runs at a time.
        endpoint: where its OpenTelemetry SDK exports to; None: it has no SDK.
    """
    shut_down = open_sdk(endpoint) if endpoint is not None else None
    asyncio.run(_serve(url, ledger, name, slots, lease_ttl))
    if shut_down is not None:
        shut_down()
