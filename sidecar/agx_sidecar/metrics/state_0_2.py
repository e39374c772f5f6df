"""The labels and buckets of the metrics of 0.2.0, whose states do not have them.

It is history and never changes; it can go once no fleet runs 0.2.0. A metric that is newer is not in here.
"""

_OPERATION = (
    10000000,
    20000000,
    40000000,
    80000000,
    160000000,
    320000000,
    640000000,
    1280000000,
    2560000000,
    5120000000,
    10240000000,
    20480000000,
    40960000000,
    81920000000,
)
_AGENT = (
    100000000,
    200000000,
    400000000,
    800000000,
    1600000000,
    3200000000,
    6400000000,
    12800000000,
    25600000000,
    51200000000,
    102400000000,
    204800000000,
    409600000000,
)
_TOKEN = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_CALL = (1, 2, 4, 8, 16, 32, 64, 128)
_CANCEL = (
    5000000,
    10000000,
    25000000,
    50000000,
    100000000,
    250000000,
    500000000,
    1000000000,
    2500000000,
    5000000000,
    10000000000,
    30000000000,
)
_APPEND = (
    500000,
    1000000,
    2500000,
    5000000,
    10000000,
    25000000,
    50000000,
    100000000,
    250000000,
    500000000,
    1000000000,
    2500000000,
    5000000000,
    10000000000,
)

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "agx_runs_started_total": ("scope agent", ()),
    "agx_runs_total": ("scope agent outcome", ()),
    "agx_run_duration_seconds": ("agent outcome", _AGENT),
    "agx_run_errors_total": ("agent error_type", ()),
    "agx_cancellations_total": ("scope agent stage reason", ()),
    "agx_cancel_latency_seconds": ("stage", _CANCEL),
    "agx_node_duration_seconds": ("agent kind outcome", _OPERATION),
    "gen_ai_client_operation_duration_seconds": (
        "gen_ai_operation_name gen_ai_provider_name gen_ai_request_model error_type",
        _OPERATION,
    ),
    "gen_ai_client_operation_time_to_first_chunk_seconds": (
        "gen_ai_operation_name gen_ai_provider_name gen_ai_request_model",
        _OPERATION,
    ),
    "gen_ai_client_operation_time_per_output_chunk_seconds": (
        "gen_ai_operation_name gen_ai_provider_name gen_ai_request_model",
        _OPERATION,
    ),
    "gen_ai_client_token_usage": (
        "gen_ai_operation_name gen_ai_provider_name gen_ai_request_model gen_ai_token_type",
        _TOKEN,
    ),
    "gen_ai_invoke_agent_duration_seconds": ("gen_ai_agent_name error_type", _AGENT),
    "gen_ai_invoke_agent_inference_calls": ("gen_ai_agent_name error_type", _CALL),
    "gen_ai_invoke_agent_tool_calls": ("gen_ai_agent_name error_type", _CALL),
    "gen_ai_execute_tool_duration_seconds": ("gen_ai_tool_name error_type", _OPERATION),
    "agx_tokens_total": ("scope agent model type", ()),
    "agx_usage_total": ("source", ()),
    "agx_cost_usd_total": ("scope agent model", ()),
    "agx_cost_unpriced_total": ("model", ()),
    "agx_tool_calls_total": ("agent tool outcome", ()),
    "agx_stream_events_total": ("scope", ()),
    "agx_stream_bytes_total": ("scope", ()),
    "agx_stream_append_retries_total": ("scope", ()),
    "agx_stream_append_failures_total": ("scope", ()),
    "agx_stream_append_latency_seconds": ("", _APPEND),
    "agx_listener_gaps_total": ("service", ()),
    "agx_listener_rereads_total": ("service", ()),
}
