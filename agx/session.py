"""Another name of `agx.sessions.base`, for imports written for agx 0.2."""

from .sessions.base import Session, SessionStore, StoredSession

__all__ = ["Session", "SessionStore", "StoredSession"]
