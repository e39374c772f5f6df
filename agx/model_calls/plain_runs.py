"""The model requests of an agent that a tool runs plainly, without a capability of ours on it (issue 12, case A20).

No hook of pydantic-ai sees such a run. `capture_run_messages()` around the tool gets its messages, and with them the
tokens of each response. It gets those of the first run in a tool call only, and not the agent's name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from pydantic_ai.messages import ModelMessage, ModelResponse

from ..facts.schema import ModelCall, Usage
from ..facts.usage import to_text
from .usage import read_usage

logger = logging.getLogger("agx")


@lru_cache(maxsize=1_000)
def report_plain_run(agent: str, tool: str) -> None:
    """Warn, once per agent and tool, of an agent that is only partly counted."""
    logger.warning(
        "agx: tool %r of agent %r runs an agent without AgxCapability: its model requests are counted under the outer "
        "agent, and only those of the first run in each call of the tool; add AgxCapability() to its capabilities",
        tool,
        agent,
    )


def find_run_id(messages: Sequence[ModelMessage]) -> str | None:
    """Return the id, pydantic-ai's, of the run whose messages were captured; None where nothing ran."""
    return messages[-1].run_id if messages else None


def describe_requests(messages: Sequence[ModelMessage], run_id: str, end_ns: int) -> list[ModelCall]:
    """Return the model requests of a captured run, which ended before `end_ns`; its history has those of others."""
    calls = []
    for number, message in enumerate(messages):
        if not isinstance(message, ModelResponse) or message.run_id != run_id:
            continue
        start_ns = _to_ns(messages[number - 1].timestamp) if number else None
        until = _to_ns(messages[number + 1].timestamp) if number + 1 < len(messages) else None
        stop_ns = min(until or end_ns, end_ns)
        calls.append(_describe(message, min(start_ns or stop_ns, stop_ns), stop_ns))
    return calls


def _describe(response: ModelResponse, start_ns: int, end_ns: int) -> ModelCall:
    name = to_text(response.model_name) or ""
    return ModelCall(
        provider=to_text(response.provider_name) or "",
        request_model=name,
        response_model=name,
        response_id=to_text(response.provider_response_id),
        finish_reason=to_text(response.finish_reason),
        usage=read_usage(response.usage) if response.usage.has_values() else Usage(source="missing"),
        start_ns=start_ns,
        end_ns=end_ns,
    )


def _to_ns(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp() * 1e9)
