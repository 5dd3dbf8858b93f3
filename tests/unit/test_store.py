"""The store: no update is lost, pages are whole, the schema and the tables agree."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from colmeia.model.base import new_id
from colmeia.model.errors import Conflict, NotFound
from colmeia.model.vm import Vm, VmSpec, VmState
from colmeia.store import documents, history, links, tables
from colmeia.store.database import Database, sqlite_url
from colmeia.store.migrate import HEAD, ensure_schema

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a_vm(name: str, uid: int) -> Vm:
    return Vm(id=new_id(), project="default", name=name, spec=VmSpec(), state=VmState.STOPPED, uid=uid, created_at=NOW)


@pytest.fixture
async def database(tmp_path: Path) -> Any:
    made = Database(sqlite_url(tmp_path / "test.db"))
    await ensure_schema(made)
    yield made
    await made.aclose()


async def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    async with database.reading() as tx:
        differences = await tx.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), tables.metadata))
        head = await tx.run_sync(lambda c: MigrationContext.configure(c).get_current_revision())
    assert (differences, head) == ([], HEAD)


async def test_concurrent_changes_are_not_lost(database: Database) -> None:
    vm = a_vm("counter", 1)
    async with database.transaction() as tx:
        await documents.vms.insert(tx, vm)

    async def increment() -> None:
        async with database.transaction() as tx:
            found = await documents.vms.get(tx, vm.id)
            await anyio.lowlevel.checkpoint()
            await documents.vms.replace(tx, found.model_copy(update={"revision": found.revision + 1}))

    async with anyio.create_task_group() as tasks:
        for _ in range(30):
            tasks.start_soon(increment)
    async with database.reading() as tx:
        assert (await documents.vms.get(tx, vm.id)).revision == 31


async def test_a_name_is_taken_once_per_project(database: Database) -> None:
    async with database.transaction() as tx:
        await documents.vms.insert(tx, a_vm("web", 1))
    with pytest.raises(Conflict, match="already a vm named 'web'"):
        async with database.transaction() as tx:
            await documents.vms.insert(tx, a_vm("web", 2))
    async with database.transaction() as tx:
        await documents.vms.insert(tx, a_vm("web", 2).model_copy(update={"project": "other"}))


async def test_pages_show_everything_once(database: Database) -> None:
    async with database.transaction() as tx:
        for number in range(25):
            await documents.vms.insert(tx, a_vm(f"vm{number:02}", number))
    names: list[str] = []
    cursor: str | None = None
    while True:
        async with database.reading() as tx:
            page, cursor = await documents.vms.page(tx, project="default", equals={}, after=cursor, limit=10)
        names += [Vm.model_validate_json(document).name for document in page]
        if cursor is None:
            break
    assert names == [f"vm{number:02}" for number in range(25)]


async def test_another_project_is_not_seen(database: Database) -> None:
    vm = a_vm("web", 1)
    async with database.transaction() as tx:
        await documents.vms.insert(tx, vm)
    async with database.reading() as tx:
        for name in ("web", vm.id):
            with pytest.raises(NotFound):
                await documents.vms.get(tx, name, project="other")


async def test_the_lowest_free_uid_is_given(database: Database) -> None:
    async with database.transaction() as tx:
        for uid in (100, 101, 103):
            await documents.vms.insert(tx, a_vm(f"vm{uid}", uid))
        assert await links.free_uid(tx, 100) == 102
        assert await links.free_uid(tx, 200) == 200


async def test_a_rolled_back_change_wakes_nobody_and_leaves_no_event(database: Database) -> None:
    change = database.change()
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as tx:
            await history.record_event(
                tx, at=NOW, project="p", kind="k", object_kind="vm", object_id="x", object_name="x", data={}
            )
            raise ZeroDivisionError
    assert not change.is_set()
    async with database.reading() as tx:
        assert await history.last_seq(tx) == 0
