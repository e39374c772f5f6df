"""`SqlSessions`: conversations in one SQL table, through SQLAlchemy's asyncio (SQLite, PostgreSQL)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_ai.messages import ModelRequest

from ..errors import SessionConflictError
from ..redis.keys import Id, check_id
from .base import (
    TITLE_LENGTH,
    Session,
    StoredSession,
    title_of,
)

try:
    import sqlalchemy as sql
    from sqlalchemy.exc import IntegrityError, StatementError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
except ModuleNotFoundError as error:
    raise ImportError("agx.sql_session needs SQLAlchemy: pip install 'opale-agent-stream[sql]'") from error


def make_table(metadata: sql.MetaData, name: str = "agx_sessions") -> sql.Table:
    """Declare the table of the conversations, in the metadata of your own tables if you migrate them (Alembic).

    Args:
        metadata: SQLAlchemy's, which the table is added to.
        name: the table's.
    """
    key = sql.String(200)  # as long as an id can be
    return sql.Table(
        name,
        metadata,
        sql.Column("scope_id", key, primary_key=True),
        sql.Column("user_id", key, primary_key=True),
        sql.Column("session_id", key, primary_key=True),
        sql.Column("version", sql.Integer, nullable=False),
        sql.Column("title", sql.String(TITLE_LENGTH), nullable=False),
        # Microseconds since 1970: SQLite has no time zones, and a listing needs only the order.
        sql.Column("saved_us", sql.BigInteger, nullable=False),
        sql.Column("messages", sql.Text, nullable=False),
        sql.Index(f"ix_{name}_saved", "scope_id", "user_id", "saved_us"),
    )


class SqlSessions:
    """The conversations of all users in one table; a `SessionStore`.

    Args:
        engine: `create_async_engine("sqlite+aiosqlite:///chats.sqlite")` or `"postgresql+asyncpg://..."`, yours to
            dispose.
        table: what `make_table()` returned, where the table is declared in your own metadata.
    """

    def __init__(self, engine: AsyncEngine, table: sql.Table | None = None) -> None:
        self.engine = engine
        self.table = make_table(sql.MetaData()) if table is None else table

    async def create_table(self) -> None:
        """Create the table if it isn't there, for those who have no migrations."""
        async with self.engine.begin() as connection:
            await connection.run_sync(self.table.metadata.create_all, tables=[self.table])

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[AsyncConnection, None]:
        """Open a transaction; the text of an exception that leaves it has no parameters, which hold the messages."""
        try:
            async with self.engine.begin() as connection:
                yield connection
        except StatementError as error:
            error.hide_parameters = True
            raise

    def open(self, scope_id: Id, user_id: Id, session_id: Id) -> SqlSession:
        """Return a session, not yet loaded, for one `run()`.

        Raises:
            TypeError: an id is neither an int nor a str.
            ValueError: an id has a character that none may have.
        """
        return SqlSession(
            self, check_id(scope_id, "scope_id"), check_id(user_id, "user_id"), check_id(session_id, "id")
        )

    async def list(self, scope_id: Id, user_id: Id, *, limit: int = 50, offset: int = 0) -> list[StoredSession]:
        """Return a user's conversations, the last saved first.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database did not answer.
        """
        columns = self.table.c
        query = (
            sql.select(columns.session_id, columns.title, columns.saved_us)
            .where(columns.scope_id == check_id(scope_id, "scope_id"), columns.user_id == check_id(user_id, "user_id"))
            .order_by(columns.saved_us.desc(), columns.session_id)
            .limit(limit)
            .offset(offset)
        )
        async with self.connect() as connection:
            rows = (await connection.execute(query)).all()
        return [StoredSession(row.session_id, row.title, _to_time(row.saved_us)) for row in rows]


@dataclass
class SqlSession(Session):
    """A conversation, kept in a row: what `SqlSessions.open()` returns.

    Optimistic: of two that loaded the same version, the second can't save.
    """

    store: SqlSessions
    scope_id: str
    user_id: str
    session_id: str
    _version: int = field(default=0, init=False, repr=False)

    async def load(self) -> None:
        """Take the conversation as it was last saved.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database did not answer.
        """
        columns = self.store.table.c
        query = sql.select(columns.version, columns.messages).where(*self._is_mine())
        async with self.store.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
        self._version = 0
        self.msgs = []
        if row is not None:
            self._version = row.version
            self.msgs_from_json(row.messages)

    async def begin(self, request: ModelRequest) -> None:
        """Write the conversation with the prompt behind it; raises what `save()` raises."""
        before, self.msgs = self.msgs, [*self.msgs, request]
        try:
            await self.save()
        finally:
            self.msgs = before

    async def save(self) -> None:
        """Write the conversation.

        Raises:
            SessionConflictError: someone saved, or deleted, it after it was loaded here.
            sqlalchemy.exc.SQLAlchemyError: the database did not take it.
        """
        table = self.store.table
        values: dict[str, Any] = {
            "version": self._version + 1,
            "title": title_of(self),
            "saved_us": _now_us(),
            "messages": self.msgs_to_json().decode(),
        }
        async with self.store.connect() as connection:
            if self._version:
                update = sql.update(table).where(*self._is_mine(), table.c.version == self._version).values(values)
                if (await connection.execute(update)).rowcount != 1:
                    raise SessionConflictError(self.session_id)
            else:
                ids = {"scope_id": self.scope_id, "user_id": self.user_id, "session_id": self.session_id}
                try:
                    await connection.execute(sql.insert(table).values({**ids, **values}))
                except IntegrityError:
                    raise SessionConflictError(self.session_id) from None
        self._version += 1

    def _is_mine(self) -> tuple[sql.ColumnElement[bool], ...]:
        columns = self.store.table.c
        return (
            columns.scope_id == self.scope_id,
            columns.user_id == self.user_id,
            columns.session_id == self.session_id,
        )


def _now_us() -> int:
    return time.time_ns() // 1_000


def _to_time(saved_us: int) -> datetime:
    return datetime.fromtimestamp(saved_us / 1_000_000, UTC)
