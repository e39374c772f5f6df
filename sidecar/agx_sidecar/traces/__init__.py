"""In: facts. Out: spans, exported over OTLP."""
