"""`SqlSessions`: conversations in one SQL table, through SQLAlchemy's asyncio (SQLite, PostgreSQL)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_ai.messages import ModelRequest

from ..errors import SessionConflictError, SessionUnknownError
from ..redis.keys import Id, check_id
from .base import TITLE_LENGTH, Session, StoredSession, check_title, fold_case, searchable_text, title_of, to_storable

try:
    import sqlalchemy as sql
    from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.schema import CreateColumn
except ModuleNotFoundError as error:
    raise ImportError("agx.sql_session needs SQLAlchemy: pip install 'opale-agent-stream[sql]'") from error

_ATTEMPTS = 5  # of processes that create or migrate the table at the same time


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
        # Since 0.3; null in the rows that an earlier version wrote.
        sql.Column("name", sql.String(TITLE_LENGTH)),  # the title that `rename()` gave
        sql.Column("parent", key),
        sql.Column("text", sql.Text),  # what a search compares: the prompts and answers
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
        """Create the table if it isn't there, and add the columns that one of an earlier version lacks.

        For those who have no migrations. Several processes may call it at the same time.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database refused.
        """
        for attempt in range(_ATTEMPTS):
            try:
                async with self.engine.begin() as connection:
                    await connection.run_sync(self._migrate)
                return
            except DBAPIError:  # another process did the same at this moment: then the next attempt finds nothing to do
                if attempt == _ATTEMPTS - 1:
                    raise

    def _migrate(self, connection: sql.Connection) -> None:
        table = self.table
        table.metadata.create_all(connection, tables=[table])
        existing = {column["name"] for column in sql.inspect(connection).get_columns(table.name, table.schema)}
        name = connection.dialect.identifier_preparer.format_table(table)
        for column in table.columns:
            if column.name not in existing:
                declared = CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(sql.text(f"ALTER TABLE {name} ADD COLUMN {declared}"))

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[AsyncConnection, None]:
        """Open a transaction; the text of an exception that leaves it has no parameters, which hold the messages."""
        try:
            async with self.engine.begin() as connection:
                yield connection
        except StatementError as error:
            error.hide_parameters = True
            raise

    def open(self, scope_id: Id, user_id: Id, session_id: Id, *, parent: Id | None = None) -> SqlSession:
        """Return a session, not yet loaded, for one `run()`.

        Args:
            parent: what a new conversation branches from.

        Raises:
            TypeError: an id is neither an int nor a str.
            ValueError: an id has a character that none may have.
        """
        ids = check_id(scope_id, "scope_id"), check_id(user_id, "user_id"), check_id(session_id, "session_id")
        return SqlSession(self, *ids, parent=None if parent is None else check_id(parent, "parent"))

    async def list(
        self,
        scope_id: Id,
        user_id: Id,
        *,
        limit: int = 50,
        offset: int = 0,
        search: str | None = None,
        parent: Id | None = None,
    ) -> list[StoredSession]:
        """Return a user's conversations, the last saved first.

        Args:
            search: only those with this text in the title, a prompt or an answer, in upper or lower case. In a title
                that `rename()` gave, SQLite ignores the case of ASCII letters only.
            parent: only those that branch from this one.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database did not answer.
        """
        columns = self.table.c
        title = sql.func.coalesce(columns.name, columns.title)
        query = (
            sql.select(columns.session_id, title.label("title"), columns.saved_us, columns.parent)
            .where(*self._owned_by(scope_id, user_id))
            .order_by(columns.saved_us.desc(), columns.session_id)
            .limit(limit)
            .offset(offset)
        )
        if search:
            # The JSON of a row that an earlier version wrote: its field names may match, too.
            searched = sql.func.lower(title + "\n" + sql.func.coalesce(columns.text, columns.messages))
            # `lower()` folds less than Python does: a title is found by its own letters, too.
            is_found = searched.contains(fold_case(search), autoescape=True)
            query = query.where(is_found | title.contains(to_storable(search), autoescape=True))
        if parent is not None:
            query = query.where(columns.parent == check_id(parent, "parent"))
        async with self.connect() as connection:
            rows = (await connection.execute(query)).all()
        return [StoredSession(row.session_id, row.title, _to_time(row.saved_us), row.parent) for row in rows]

    async def rename(self, scope_id: Id, user_id: Id, session_id: Id, title: str) -> None:
        """Give a conversation a title, which later turns do not change.

        Args:
            title: 1 to 200 characters.

        Raises:
            TextError: such a title can't be stored.
            SessionUnknownError: the user has no such conversation.
            sqlalchemy.exc.SQLAlchemyError: the database did not take it.
        """
        session = check_id(session_id, "session_id")
        where = (*self._owned_by(scope_id, user_id), self.table.c.session_id == session)
        async with self.connect() as connection:
            update = sql.update(self.table).where(*where).values(name=check_title(title))
            if (await connection.execute(update)).rowcount != 1:
                raise SessionUnknownError(session)

    async def delete(self, scope_id: Id, user_id: Id, session_id: Id) -> bool:
        """Remove a stored conversation; returns whether it was there. Its branches stay, without a `parent`.

        `agx.delete_session()` calls it, and removes all data of the session from Redis.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database did not do it.
        """
        session, columns, ours = check_id(session_id, "session_id"), self.table.c, self._owned_by(scope_id, user_id)
        async with self.connect() as connection:
            await connection.execute(sql.update(self.table).where(*ours, columns.parent == session).values(parent=None))
            removed = await connection.execute(sql.delete(self.table).where(*ours, columns.session_id == session))
        return removed.rowcount == 1

    def _owned_by(self, scope_id: Id, user_id: Id) -> tuple[sql.ColumnElement[bool], ...]:
        columns = self.table.c
        return columns.scope_id == check_id(scope_id, "scope_id"), columns.user_id == check_id(user_id, "user_id")


@dataclass
class SqlSession(Session):
    """A conversation, kept in a row: what `SqlSessions.open()` returns.

    Optimistic: of two that loaded the same version, the second can't save.
    """

    store: SqlSessions
    scope_id: str
    user_id: str
    session_id: str
    parent: str | None = None  # what a new conversation branches from
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
        """Write the conversation with the prompt after it; raises what `save()` raises."""
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
            "text": searchable_text(self.msgs),
        }
        async with self.store.connect() as connection:
            if self._version:
                update = sql.update(table).where(*self._is_mine(), table.c.version == self._version).values(values)
                if (await connection.execute(update)).rowcount != 1:
                    raise SessionConflictError(self.session_id)
            else:
                ids = {"scope_id": self.scope_id, "user_id": self.user_id, "session_id": self.session_id}
                try:
                    await connection.execute(sql.insert(table).values({**ids, **values, "parent": self.parent}))
                except IntegrityError:
                    raise SessionConflictError(self.session_id) from None
        self._version += 1

    def _is_mine(self) -> tuple[sql.ColumnElement[bool], ...]:
        table = self.store.table
        return *self.store._owned_by(self.scope_id, self.user_id), table.c.session_id == self.session_id


def _now_us() -> int:
    return time.time_ns() // 1_000


def _to_time(saved_us: int) -> datetime:
    return datetime.fromtimestamp(saved_us / 1_000_000, UTC)
