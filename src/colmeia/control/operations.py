"""Durable operations: a row in the same transaction as the change it makes, run by one worker per target.

An operation is a function that may be run again from its start at any time. If the daemon dies, the next one runs
every unfinished operation again. When a function fails or is cancelled, its undo runs, then the end is written.
What this module refuses: to retry what failed (only what could not be written down is run again), and to keep
anything about an operation only in memory.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel
import structlog
from anyio.abc import TaskGroup

from colmeia.model.base import new_id
from colmeia.model.errors import Busy, ColmeiaError, Conflict, Internal, OutcomeUnknown
from colmeia.model.operation import OPERATION_TRANSITIONS, Operation, OperationState, Problem
from colmeia.store import history
from colmeia.store.database import Connection, Database

log = structlog.get_logger()

UNDO_TIMEOUT_S = 30.0
PROGRESS_INTERVAL_S = 0.5
DATABASE_RETRY_S = 2.0

Finish = Callable[[Connection], Awaitable[None]]
"""The last change of an operation: committed together with the operation's end."""


class Job:
    """What a running operation sees of itself."""

    def __init__(self, operation: Operation, database: Database) -> None:
        self.operation = operation
        self._database = database
        self._news: tuple[float, str] | None = None
        self._has_news = anyio.Event()

    @property
    def target_id(self) -> str:
        return self.operation.target_id

    def progress(self, share: float, message: str) -> None:
        """Say how far it is (0 to 1). Costs nothing: the row is written at most twice a second."""
        self._news = (min(max(share, 0.0), 1.0), message[:200])
        self._has_news.set()

    async def write_progress(self) -> None:
        """Write down what `progress` says, until cancelled."""
        while True:
            await self._has_news.wait()
            self._has_news = anyio.Event()
            if self._news is None:
                continue
            share, message = self._news
            with anyio.CancelScope(shield=True):
                async with self._database.transaction() as tx:
                    current = await history.get_operation(tx, self.operation.id, project=None)
                    if current.state.is_final:
                        return
                    self.operation = current.model_copy(update={"progress": share, "message": message})
                    await history.write_operation(tx, self.operation)
                    await _tell(tx, self.operation)
            await anyio.sleep(PROGRESS_INTERVAL_S)


@dataclass(frozen=True)
class Handler:
    """How one kind of operation is carried out. ``undo`` leaves nothing half-made behind; it must not fail lightly."""

    run: Callable[[Job], Awaitable[Finish | None]]
    undo: Callable[[Job], Awaitable[None]] | None = None
    is_cancellable: bool = True


@dataclass
class _Target:
    """The worker of one object: what it does now, and what waits."""

    lock: anyio.Lock = field(default_factory=anyio.Lock)
    scope: anyio.CancelScope | None = None
    running: str | None = None
    waiting: list[str] = field(default_factory=list)
    is_served: bool = False
    users: int = 0


class Operations:
    """Accepts, runs, cancels and recovers operations. `run()` is the parent of every worker."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._handlers: dict[str, Handler] = {}
        self._targets: defaultdict[str, _Target] = defaultdict(_Target)
        self._tasks: TaskGroup | None = None
        self._waiting: defaultdict[str, set[anyio.Event]] = defaultdict(set)

    def register(self, kind: str, handler: Handler) -> None:
        self._handlers[kind] = handler

    async def submit(
        self,
        tx: Connection,
        *,
        kind: str,
        project: str,
        target: tuple[str, str, str],
        requested_by: str,
        arguments: dict[str, Any] | None = None,
    ) -> Operation:
        """Write a queued operation in the caller's transaction. Call `wake` after the commit.

        ``target`` is (noun, id, name). Raises Busy when the object already has an unfinished operation.
        """
        noun, target_id, name = target
        other = await history.unfinished_of(tx, target_id)
        if other is not None:
            raise Busy(
                "operation_in_progress",
                f"Cannot queue {kind} for {noun} {name}: operation {other.id} ({other.kind}) is not finished.",
                f"Wait for it: colmeia operation wait {other.id} (or cancel it).",
            )
        operation = Operation(
            id=new_id(),
            project=project,
            kind=kind,
            target_kind=noun,
            target_id=target_id,
            target_name=name,
            arguments=arguments or {},
            state=OperationState.QUEUED,
            requested_by=requested_by,
            created_at=_now(),
        )
        await history.insert_operation(tx, operation)
        await _tell(tx, operation)
        return operation

    def wake(self, operation: Operation) -> None:
        """Have a committed operation carried out. Does nothing when its worker already knows of it."""
        if self._tasks is None:
            return  # `run` picks up every unfinished row when it starts
        target = self._targets[operation.target_id]
        if operation.id == target.running or operation.id in target.waiting:
            return
        target.waiting.append(operation.id)
        if not target.is_served:
            target.is_served = True
            self._tasks.start_soon(self._serve, operation.target_id, target, name=f"worker-{operation.target_id}")

    async def cancel(self, operation_id: str, *, project: str | None) -> Operation:
        """Ask an operation to end: it is undone first. Raises Conflict when it has ended or cannot be cancelled."""
        async with self._database.transaction() as tx:
            operation = await history.get_operation(tx, operation_id, project=project)
            if operation.state.is_final:
                raise Conflict(
                    "operation_finished",
                    f"Operation {operation.id} has already ended: {operation.state.value}.",
                    "Nothing is left to cancel.",
                )
            if not self._handlers[operation.kind].is_cancellable:
                raise Conflict(
                    "not_cancellable",
                    f"{operation.kind} cannot be cancelled: it destroys as it goes.",
                    "Wait until it ends.",
                )
            operation = operation.model_copy(update={"cancel_requested": True})
            await history.write_operation(tx, operation)
            await _tell(tx, operation)
        target = self._targets.get(operation.target_id)
        if target is not None and target.running == operation.id and target.scope is not None:
            target.scope.cancel()
        return operation

    async def wait(self, operation_id: str, *, project: str | None, timeout_s: float) -> Operation:
        """Return the operation when it has ended, or as it is after ``timeout_s``.

        Each wait has an event of its own: reading again at every commit made 40 waits for 40 starts twice as slow.
        """
        ended = anyio.Event()
        self._waiting[operation_id].add(ended)  # before the first look: no end is missed
        try:
            async with self._database.reading() as tx:
                operation = await history.get_operation(tx, operation_id, project=project)
            if operation.state.is_final or timeout_s == 0:
                return operation
            with anyio.move_on_after(timeout_s):
                await ended.wait()
        finally:
            self._waiting[operation_id].discard(ended)
            if not self._waiting[operation_id]:
                del self._waiting[operation_id]
        async with self._database.reading() as tx:
            return await history.get_operation(tx, operation_id, project=project)

    @asynccontextmanager
    async def exclusive(self, target_id: str) -> AsyncIterator[None]:
        """Keep operations off one object while something was seen that must be written down."""
        target = self._targets[target_id]
        target.users += 1
        try:
            async with target.lock:
                yield
        finally:
            target.users -= 1
            self._drop_if_idle(target_id, target)

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. Starts with every operation that an earlier daemon left unfinished."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                async with self._database.reading() as tx:
                    left = await history.unfinished_operations(tx)
                for operation in left:
                    log.info("operation.recovered", operation=operation.id, kind=operation.kind)
                    self.wake(operation)
                task_status.started()
                await anyio.sleep_forever()
            finally:
                self._tasks = None

    async def _serve(self, target_id: str, target: _Target) -> None:
        while target.waiting:
            async with target.lock:
                target.running = target.waiting.pop(0)
                try:
                    await self._carry_out(target, target.running)
                except (
                    ColmeiaError
                ) as error:  # the database itself failed: the row stays, and is run again from its start
                    log.error("operation.unrecorded", operation=target.running, error=str(error))
                    target.waiting.insert(0, target.running)
                    await anyio.sleep(DATABASE_RETRY_S)
                finally:
                    target.running = target.scope = None
        target.is_served = False
        self._drop_if_idle(target_id, target)

    def _drop_if_idle(self, target_id: str, target: _Target) -> None:
        if not target.is_served and not target.users and not target.waiting:
            self._targets.pop(target_id, None)

    async def _carry_out(self, target: _Target, operation_id: str) -> None:
        async with self._database.transaction() as tx:
            operation = await history.get_operation(tx, operation_id, project=None)
            if operation.state.is_final:
                return
            begun = {"state": OperationState.RUNNING, "attempts": operation.attempts + 1, "started_at": _now()}
            operation = operation.model_copy(update=begun)
            await history.write_operation(tx, operation)
            await _tell(tx, operation)
        job = Job(operation, self._database)
        handler = self._handlers[operation.kind]
        bound = structlog.contextvars.bound_contextvars(operation=operation.id, target=operation.target_name)
        error: ColmeiaError | None = None
        with bound, anyio.CancelScope() as scope:
            target.scope = scope
            if operation.cancel_requested:
                scope.cancel()
            error = await self._attempt(handler, job)
            target.scope = None
            if error is None:
                return
        cancelled = scope.cancelled_caught
        await self._undo(handler, job)
        await self._end(job.operation, None if cancelled else error)

    async def _attempt(self, handler: Handler, job: Job) -> ColmeiaError | None:
        """Run the handler and record its success; return why it failed. A cancellation passes through."""
        await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(job.write_progress, name=f"progress-{job.operation.id}")
            error, finish = await _outcome(handler, job)
            tasks.cancel_scope.cancel()
        if error is not None:
            return error
        with anyio.CancelScope(shield=True):
            async with self._database.transaction() as tx:
                if finish is not None:
                    await finish(tx)
                done = {"state": OperationState.DONE, "progress": 1.0, "finished_at": _now()}
                await self._close(tx, job.operation, done)
            self._tell_waiting(job.operation)
        return None

    async def _undo(self, handler: Handler, job: Job) -> None:
        if handler.undo is None:
            return
        with anyio.move_on_after(UNDO_TIMEOUT_S, shield=True) as scope:
            try:
                await handler.undo(job)
            except Exception:
                log.exception("operation.undo_failed", kind=job.operation.kind)
        if scope.cancelled_caught:
            log.error("operation.undo_timed_out", kind=job.operation.kind)

    async def _end(self, operation: Operation, error: ColmeiaError | None) -> None:
        state = OperationState.CANCELLED if error is None else OperationState.FAILED
        problem = (
            None if error is None else Problem(kind=error.kind, code=error.code, detail=error.message, hint=error.hint)
        )
        with anyio.CancelScope(shield=True):
            async with self._database.transaction() as tx:
                await self._close(tx, operation, {"state": state, "error": problem, "finished_at": _now()})
            self._tell_waiting(operation)

    def _tell_waiting(self, operation: Operation) -> None:
        """Wake who waits for the end of an operation. Call it after the commit."""
        for ended in self._waiting.get(operation.id, ()):
            ended.set()

    async def _close(self, tx: Connection, operation: Operation, update: dict[str, Any]) -> None:
        current = await history.get_operation(tx, operation.id, project=None)
        if update["state"] not in OPERATION_TRANSITIONS[current.state]:
            raise OutcomeUnknown("operation_state", f"Operation {current.id} is already {current.state.value}.")
        ended = current.model_copy(update=update)
        await history.write_operation(tx, ended)
        await _tell(tx, ended)
        log.info(
            "operation.ended",
            operation=ended.id,
            kind=ended.kind,
            target=ended.target_name,
            state=ended.state.value,
            error=ended.error.code if ended.error else None,
        )


async def _outcome(handler: Handler, job: Job) -> tuple[ColmeiaError | None, Finish | None]:
    """Return why the handler failed, or its last change."""
    try:
        return None, await handler.run(job)
    except ColmeiaError as error:
        return error, None
    except Exception as error:
        log.exception("operation.defect", kind=job.operation.kind)
        what = f"{job.operation.kind} met a defect: {type(error).__name__}."
        return Internal("internal", what, "Please report it with the daemon's log."), None


async def _tell(tx: Connection, operation: Operation) -> None:
    data: dict[str, Any] = {
        "state": operation.state.value,
        "kind": operation.kind,
        "target_id": operation.target_id,
        "progress": operation.progress,
        "message": operation.message,
    }
    if operation.error is not None:
        data["error"] = operation.error.model_dump()
    await history.record_event(
        tx,
        at=_now(),
        project=operation.project,
        kind="operation.state",
        object_kind="operation",
        object_id=operation.id,
        object_name=operation.target_name,
        data=data,
    )


def _now() -> datetime:
    return datetime.now(UTC)
