"""What the web process and the workers share: Redis, and the conversations in a database."""

import os

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from agx.sql_session import SqlSessions

redis = Redis.from_url(os.environ.get("AGX_REDIS_URL", "redis://localhost:6379"))
engine = create_async_engine(os.environ.get("SHOP_DATABASE", "sqlite+aiosqlite:///shop.sqlite"))
sessions = SqlSessions(engine)
