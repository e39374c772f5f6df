"""In: entries of a session's stream. Out: events for listeners: dicts, SSE frames, pydantic-ai's own events."""
