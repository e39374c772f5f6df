"""Another name of `agx.listeners.replay`, for imports written for agx 0.2."""

from .listeners.replay import ErrorEvent, Event, InfoEvent, replay, replay_entries, replay_messages

__all__ = ["ErrorEvent", "Event", "InfoEvent", "replay", "replay_entries", "replay_messages"]
