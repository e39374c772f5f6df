"""Other names of `agx.listeners.replay` and `replayed_run`, for imports written for agx 0.2."""

from .listeners.replay import replay, replay_entries, replay_messages
from .listeners.replayed_run import ErrorEvent, Event, InfoEvent

__all__ = ["ErrorEvent", "Event", "InfoEvent", "replay", "replay_entries", "replay_messages"]
