"""Bring the schema up to date. Alembic is loaded only when there is something to do: it costs memory for ever."""

from pathlib import Path

from sqlalchemy import Connection as SyncConnection

from colmeia.store.database import Database, is_current

HEAD = "0001"


async def ensure_schema(database: Database) -> None:
    """Create or upgrade the tables. Safe to repeat; a second daemon waits for the first one's transaction."""
    if not await is_current(database, HEAD):
        async with database.transaction() as connection:
            await connection.run_sync(_upgrade)


def _upgrade(connection: SyncConnection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
