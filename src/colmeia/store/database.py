"""Connections and transactions. SQLite on one host; PostgreSQL is a URL away.

SQLite facts that decide the shape (measured): with the driver's defaults concurrent read-modify-write loses updates
without an error; `BEGIN IMMEDIATE` does not. Writers therefore start with it and queue in this process for one
connection, so that "database is locked" only comes from outside; readers never wait for them (WAL).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from colmeia.model.errors import Unavailable

Connection = AsyncConnection

_PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000")


class Database:
    """Hands out transactions and wakes those who wait for a change.

    One per daemon. `transaction()` commits at the end of its block or rolls everything back; `reading()` sees one
    consistent moment and must not write.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            self._writer = _sqlite_engine(url, "BEGIN IMMEDIATE", connections=1)
            self._reader = _sqlite_engine(url, "BEGIN", connections=3)
        else:
            self._writer = self._reader = create_async_engine(url, pool_pre_ping=True)
        self._changed = anyio.Event()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Run a block that writes. Raises Unavailable (`database_busy`) when another process holds the database."""
        async with self._connect(self._writer) as connection:
            yield connection
        self._changed.set()
        self._changed = anyio.Event()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """Run a block that only reads."""
        async with self._connect(self._reader) as connection:
            yield connection

    @asynccontextmanager
    async def _connect(self, engine: AsyncEngine) -> AsyncIterator[Connection]:
        try:
            async with engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise Unavailable(
                "database_unavailable",
                f"The database did not answer as it should: {_first_line(error)}.",
                "Check that the disk is not full and that no other program holds the database, then try again.",
            ) from error

    def change(self) -> anyio.Event:
        """Return an event that is set at the next commit. Take it *before* reading, then wait: nothing is missed."""
        return self._changed

    async def ping(self) -> None:
        """Raise Unavailable when the database does not answer."""
        async with self.reading() as connection:
            await connection.execute(text("SELECT 1"))

    async def aclose(self) -> None:
        await self._writer.dispose()
        await self._reader.dispose()


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return f"sqlite+aiosqlite:///{path}"


async def is_current(database: Database, revision: str) -> bool:
    """Tell whether the schema is at ``revision``, without loading the migration machinery."""
    try:
        async with database.reading() as connection:
            found = await connection.scalar(text("SELECT version_num FROM alembic_version"))
    except (Unavailable, DBAPIError):
        return False
    return bool(found == revision)


def _sqlite_engine(url: str, begin: str, *, connections: int) -> AsyncEngine:
    engine = create_async_engine(url, pool_size=connections, max_overflow=0, pool_timeout=30)

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin by itself
        cursor = connection.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0][:200]
