"""The GenAI names of OpenTelemetry that agx writes, in one table, since upstream renames some of them.

Source: open-telemetry/semantic-conventions-genai, status Development. `current` has the names that instrumentations and
backends use today (conventions 1.41), `next` those of the GenAI conventions' first release, 0.1.0.
"""

from collections.abc import Mapping
from typing import Literal

Semconv = Literal["current", "both", "next"]

OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_STREAM = "gen_ai.request.stream"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
CONVERSATION_ID = "gen_ai.conversation.id"
AGENT_NAME = "gen_ai.agent.name"
TOOL_NAME = "gen_ai.tool.name"
TOOL_CALL_ID = "gen_ai.tool.call.id"
TOOL_TYPE = "gen_ai.tool.type"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ = "gen_ai.usage.cache_read.input_tokens"
USAGE_CACHE_WRITE: Mapping[Semconv, tuple[str, ...]] = {  # genai#440
    "current": ("gen_ai.usage.cache_creation.input_tokens",),
    "both": ("gen_ai.usage.cache_creation.input_tokens", "gen_ai.usage.cache_write.input_tokens"),
    "next": ("gen_ai.usage.cache_write.input_tokens",),
}
USAGE_REASONING = "gen_ai.usage.reasoning.output_tokens"
ERROR_TYPE = "error.type"

EVALUATION_RESULT = "gen_ai.evaluation.result"
EVALUATION_NAME = "gen_ai.evaluation.name"
EVALUATION_SCORE = "gen_ai.evaluation.score.value"
EVALUATION_EXPLANATION = "gen_ai.evaluation.explanation"

INVOKE_AGENT = "invoke_agent"
CHAT = "chat"
EXECUTE_TOOL = "execute_tool"

# Metrics: the name in `current`, and the one in `next`.
OPERATION_DURATION = ("gen_ai.client.operation.duration", "gen_ai.client.inference.duration")  # genai#521
FIRST_CHUNK = ("gen_ai.client.operation.time_to_first_chunk", "gen_ai.client.inference.time_to_first_chunk")
OUTPUT_CHUNK = ("gen_ai.client.operation.time_per_output_chunk", "gen_ai.client.inference.time_per_output_chunk")
# Of tokens there is one histogram in `current`, and in `next` a counter and a histogram for each type (genai#374).
USAGE = "gen_ai.client.token.usage"
USAGE_COUNTER = "gen_ai.client.inference.usage.{}_tokens"
USAGE_PER_OPERATION = "gen_ai.client.inference.operation.{}_tokens"
INVOKE_DURATION = "gen_ai.invoke_agent.duration"
INFERENCE_CALLS = "gen_ai.invoke_agent.inference_calls"
TOOL_CALLS = "gen_ai.invoke_agent.tool_calls"
TOOL_DURATION = "gen_ai.execute_tool.duration"
# Names that public boards use and the conventions don't have, or have for a server's own measurement. In `both` only.
REQUEST_COST = "gen_ai.usage.cost"  # OpenLIT, LiteLLM
COST_TOTAL = "gen_ai.client.cost_usd"  # agentgateway, llmtap
FIRST_TOKEN = ("gen_ai.client.time_to_first_token", "gen_ai.server.time_to_first_token")  # Grafana; OpenLIT, LiteLLM

UNKNOWN_TOOL = "__unknown__"  # for a name that a model invented: names of spans have to be few

# Names of agx, where the conventions have none yet (cancellation: genai#238).
RUN_OUTCOME = "agx.run.outcome"
RUN_REASON = "agx.run.reason"
RUN_ID = "agx.run.id"
FEEDBACK_BY = "agx.feedback.by"
ATTEMPT = "agx.run.attempt"
SCOPE_ID = "agx.scope.id"
SESSION_ID = "agx.session.id"
NODE_KIND = "agx.node.kind"
NODE_INDEX = "agx.node.idx"
NODE_OUTCOME = "agx.node.outcome"
TOOL_OUTCOME = "agx.tool.outcome"
FINISH_REASON = "agx.finish_reason"
USAGE_SOURCE = "agx.usage.source"
TRACE_PARTIAL = "agx.trace.partial"
DROPPED_EVENTS = "agx.stream.events_between"

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


def conversation_id(scope: str, user: str, session: str) -> str:
    """Return a conversation's id in telemetry: no two tenants share one (contract, section 5). No part has a slash."""
    return f"{scope}/{user}/{session}"
