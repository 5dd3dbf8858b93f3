"""Operations and events: what was asked, and what happened, in order."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, select, update

from colmeia.model.errors import NotFound
from colmeia.model.event import Event
from colmeia.model.operation import Operation, OperationState
from colmeia.store import tables
from colmeia.store.database import Connection

_op = tables.operations.c
_ev = tables.events.c


async def insert_operation(tx: Connection, operation: Operation) -> None:
    order = select(func.coalesce(func.max(_op.order), 0) + 1).scalar_subquery()
    await tx.execute(insert(tables.operations).values(**_columns(operation), order=order))


async def write_operation(tx: Connection, operation: Operation) -> None:
    await tx.execute(update(tables.operations).where(_op.id == operation.id).values(**_columns(operation)))


async def get_operation(tx: Connection, operation_id: str, *, project: str | None) -> Operation:
    """Raises NotFound, also for an operation of another project."""
    query = select(_op.document).where(_op.id == operation_id)
    if project is not None:
        query = query.where(_op.project == project)
    document = await tx.scalar(query)
    if document is None:
        raise NotFound(
            "operation_not_found", f"There is no operation {operation_id[:64]!r}.", "See: colmeia operation list."
        )
    return Operation.model_validate_json(document)


async def unfinished_operations(tx: Connection) -> list[Operation]:
    """Return what is queued or running, oldest first: the order in which it was asked for."""
    open_states = (OperationState.QUEUED.value, OperationState.RUNNING.value)
    query = select(_op.document).where(_op.state.in_(open_states)).order_by(_op.order)
    return [Operation.model_validate_json(row) for row in (await tx.scalars(query)).all()]


async def unfinished_of(tx: Connection, target_id: str) -> Operation | None:
    """Return the oldest unfinished operation of one object, or None."""
    open_states = (OperationState.QUEUED.value, OperationState.RUNNING.value)
    query = select(_op.document).where(_op.target_id == target_id, _op.state.in_(open_states)).order_by(_op.order)
    document = await tx.scalar(query.limit(1))
    return None if document is None else Operation.model_validate_json(document)


async def page_operations(
    tx: Connection, *, project: str | None, equals: Mapping[str, str], before: int | None, limit: int
) -> tuple[Sequence[str], str | None]:
    """Return documents newest first and the next page's cursor."""
    query = select(_op.order, _op.document).order_by(_op.order.desc()).limit(limit + 1)
    if project is not None:
        query = query.where(_op.project == project)
    if before is not None:
        query = query.where(_op.order < before)
    for key, value in equals.items():
        query = query.where(_op[key] == value)
    rows = (await tx.execute(query)).all()
    more = len(rows) > limit
    rows = rows[:limit]
    return [row.document for row in rows], str(rows[-1].order) if more else None


async def record_event(
    tx: Connection,
    *,
    at: datetime,
    project: str,
    kind: str,
    object_kind: str,
    object_id: str,
    object_name: str,
    data: dict[str, Any],
) -> None:
    event = Event(
        seq=0,
        at=at,
        project=project,
        kind=kind,
        object_kind=object_kind,
        object_id=object_id,
        object_name=object_name,
        data=data,
    )
    document = event.model_dump_json(exclude={"seq"})
    row = {"at": at, "project": project, "kind": kind, "object_id": object_id, "document": document}
    await tx.execute(insert(tables.events).values(**row))


async def events_after(
    tx: Connection, seq: int, *, project: str | None, limit: int, newest_first: bool = False
) -> list[Event]:
    """Return up to ``limit`` events that came after ``seq``."""
    query = select(_ev.seq, _ev.document).where(_ev.seq > seq).limit(limit)
    query = query.order_by(_ev.seq.desc() if newest_first else _ev.seq)
    if project is not None:
        query = query.where(_ev.project == project)
    return [_event(row.seq, row.document) for row in (await tx.execute(query)).all()]


async def last_seq(tx: Connection) -> int:
    return (await tx.scalar(select(func.coalesce(func.max(_ev.seq), 0)))) or 0


async def count_events(tx: Connection, *, object_id: str, kind: str, since: datetime) -> int:
    query = select(func.count()).where(_ev.object_id == object_id, _ev.kind == kind, _ev.at >= since)
    return (await tx.scalar(query)) or 0


async def count_by_state(tx: Connection) -> dict[str, dict[str, int]]:
    """Return, for VMs and operations, how many there are in each state."""
    counts: dict[str, dict[str, int]] = {}
    for table in (tables.vms, tables.operations):
        rows = (await tx.execute(select(table.c.state, func.count()).group_by(table.c.state))).all()
        counts[table.name] = {row[0]: row[1] for row in rows}
    return counts


async def forget_before(tx: Connection, moment: datetime) -> None:
    """Drop events and idempotency keys older than ``moment``."""
    await tx.execute(delete(tables.events).where(_ev.at < moment))
    await tx.execute(delete(tables.idempotency_keys).where(tables.idempotency_keys.c.at < moment))


def _event(seq: int, document: str) -> Event:
    return Event.model_validate_json(f'{{"seq":{seq},{document[1:]}')


def _columns(operation: Operation) -> dict[str, Any]:
    return {
        "id": operation.id,
        "project": operation.project,
        "state": operation.state.value,
        "target_id": operation.target_id,
        "cancel_requested": operation.cancel_requested,
        "document": operation.model_dump_json(),
    }
