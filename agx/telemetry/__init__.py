"""In: the service's OpenTelemetry set-up. Out: trace context and spans under the GenAI names."""
