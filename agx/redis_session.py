"""Another name of `agx.sessions.redis_session`, for imports written for agx 0.2."""

from .sessions.redis_session import RedisSession, RedisSessions

__all__ = ["RedisSession", "RedisSessions"]
