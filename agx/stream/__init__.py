"""In: pydantic-ai's events. Out: entries of the session's Redis Stream, appended in order and read once per process."""
