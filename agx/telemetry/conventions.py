"""The GenAI names of OpenTelemetry that agx writes, in one table, since upstream renames some of them.

Source: open-telemetry/semantic-conventions-genai, status Development.
"""

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
# Renamed upstream to `gen_ai.usage.cache_write.input_tokens` (genai#440); pydantic-ai 2.68 and backends use this one.
USAGE_CACHE_WRITE = "gen_ai.usage.cache_creation.input_tokens"
USAGE_REASONING = "gen_ai.usage.reasoning.output_tokens"
ERROR_TYPE = "error.type"

INVOKE_AGENT = "invoke_agent"
CHAT = "chat"
EXECUTE_TOOL = "execute_tool"

UNKNOWN_TOOL = "__unknown__"  # for a name that a model invented: names of spans have to be few

# Names of agx, where the conventions have none yet (cancellation: genai#238).
RUN_OUTCOME = "agx.run.outcome"
RUN_REASON = "agx.run.reason"
RUN_ID = "agx.run.id"
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
