"""Another name of `agx.sessions.sql_session`, for imports written for agx 0.2."""

from .sessions.sql_session import SqlSession, SqlSessions, make_table

__all__ = ["SqlSession", "SqlSessions", "make_table"]
