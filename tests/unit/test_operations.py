"""Durable operations: they run, fail, are cancelled, and run again after a crash."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from colmeia.control.operations import Finish, Handler, Job, Operations
from colmeia.model.base import new_id
from colmeia.model.errors import Busy, Conflict, Invalid
from colmeia.model.operation import Operation, OperationState
from colmeia.store import history
from colmeia.store.database import Database, sqlite_url
from colmeia.store.migrate import ensure_schema

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[Database, Operations]]:
    database = Database(sqlite_url(folder / "test.db"))
    await ensure_schema(database)
    try:
        yield database, Operations(database)
    finally:
        await database.aclose()


@asynccontextmanager
async def running(operations: Operations) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        await tasks.start(operations.run)
        yield
        tasks.cancel_scope.cancel()


async def submit(database: Database, operations: Operations, kind: str, target: str | None = None) -> Operation:
    async with database.transaction() as tx:
        operation = await operations.submit(
            tx, kind=kind, project="default", target=("vm", target or new_id(), "x"), requested_by="test"
        )
    operations.wake(operation)
    return operation


async def ended(operations: Operations, operation: Operation) -> Operation:
    found = await operations.wait(operation.id, project=None, timeout_s=10)
    assert found.state.is_final, found
    return found


def does(action: Callable[[Job], Awaitable[Finish | None]]) -> Handler:
    return Handler(action)


async def test_the_last_change_is_committed_with_the_end(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        seen: list[OperationState] = []

        async def work(job: Job) -> Finish:
            async def finish(tx: object) -> None:
                current = await history.get_operation(tx, job.operation.id, project=None)  # type: ignore[arg-type]
                seen.append(current.state)

            return finish

        operations.register("work", does(work))
        async with running(operations):
            assert (await ended(operations, await submit(database, operations, "work"))).state is OperationState.DONE
        assert seen == [OperationState.RUNNING]


async def test_a_known_error_is_stored_with_its_code_and_undone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        undone = anyio.Event()

        async def work(_job: Job) -> None:
            raise Invalid("too_odd", "It is odd.", "Even it.")

        async def undo(_job: Job) -> None:
            undone.set()

        operations.register("work", Handler(work, undo))
        async with running(operations):
            found = await ended(operations, await submit(database, operations, "work"))
        assert (found.state, undone.is_set()) == (OperationState.FAILED, True)
        assert found.error is not None
        assert (found.error.code, found.error.hint) == ("too_odd", "Even it.")


async def test_a_defect_in_a_handler_becomes_an_internal_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):

        async def work(_job: Job) -> None:
            raise KeyError("secret")

        operations.register("work", does(work))
        async with running(operations):
            found = await ended(operations, await submit(database, operations, "work"))
        assert found.error is not None
        assert found.error.kind == "internal"
        assert "secret" not in found.error.detail


async def test_cancel_ends_the_work_and_undoes_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        started, undone = anyio.Event(), anyio.Event()

        async def work(_job: Job) -> None:
            started.set()
            await anyio.sleep_forever()

        async def undo(_job: Job) -> None:
            undone.set()

        operations.register("work", Handler(work, undo))
        async with running(operations):
            operation = await submit(database, operations, "work")
            await started.wait()
            await operations.cancel(operation.id, project=None)
            found = await ended(operations, operation)
            with pytest.raises(Conflict, match="already ended"):
                await operations.cancel(operation.id, project=None)
        assert (found.state, undone.is_set()) == (OperationState.CANCELLED, True)


async def test_what_destroys_cannot_be_cancelled(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        go = anyio.Event()

        async def work(_job: Job) -> None:
            await go.wait()

        operations.register("work", Handler(work, is_cancellable=False))
        async with running(operations):
            operation = await submit(database, operations, "work")
            with pytest.raises(Conflict, match="cannot be cancelled"):
                await operations.cancel(operation.id, project=None)
            go.set()
            assert (await ended(operations, operation)).state is OperationState.DONE


async def test_an_interrupted_operation_runs_again_from_its_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        started = anyio.Event()

        async def hang(_job: Job) -> None:
            started.set()
            await anyio.sleep_forever()

        operations.register("work", does(hang))
        async with running(operations):
            operation = await submit(database, operations, "work")
            await started.wait()  # then the daemon ends: the worker dies without writing anything

        async def work(_job: Job) -> None: ...

        again = Operations(database)
        again.register("work", does(work))
        async with running(again):
            found = await ended(again, operation)
        assert (found.state, found.attempts) == (OperationState.DONE, 2)


async def test_one_object_has_one_worker_and_different_ones_work_in_parallel(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        arrived = [anyio.Event(), anyio.Event()]
        waiting = iter(arrived)

        async def meet(_job: Job) -> None:
            next(waiting).set()
            for event in arrived:
                await event.wait()

        operations.register("meet", does(meet))
        async with running(operations):
            one = await submit(database, operations, "meet", "00000000000000aa")
            with pytest.raises(Busy, match="not finished"):
                await submit(database, operations, "meet", "00000000000000aa")
            other = await submit(database, operations, "meet", "00000000000000bb")
            for operation in (one, other):
                assert (await ended(operations, operation)).state is OperationState.DONE


async def test_progress_is_written_and_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, operations):
        go = anyio.Event()

        async def work(job: Job) -> None:
            job.progress(0.5, "half way")
            await go.wait()

        operations.register("work", does(work))
        async with running(operations):
            operation = await submit(database, operations, "work")
            with anyio.fail_after(10):
                while True:
                    change = database.change()
                    async with database.reading() as tx:
                        found = await history.get_operation(tx, operation.id, project=None)
                    if found.message:
                        break
                    await change.wait()
            assert (found.progress, found.message) == (0.5, "half way")
            go.set()
            assert (await ended(operations, operation)).progress == 1.0
