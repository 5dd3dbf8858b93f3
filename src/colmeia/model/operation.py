"""Operations: long work as a durable row. The states, and who moves between them."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field

from colmeia.model.base import Id, Model


class OperationState(StrEnum):
    """A crash of the daemon leaves QUEUED and RUNNING rows; the next start runs both again from their beginning."""

    QUEUED = "queued"  # entered with the change that asks for it; left by the worker of its target
    RUNNING = "running"  # entered by the worker; left by its end
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED)


OPERATION_TRANSITIONS: dict[OperationState, frozenset[OperationState]] = {
    OperationState.QUEUED: frozenset({OperationState.RUNNING, OperationState.CANCELLED}),
    OperationState.RUNNING: frozenset(
        {OperationState.QUEUED, OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED}
    ),
    OperationState.DONE: frozenset(),
    OperationState.FAILED: frozenset(),
    OperationState.CANCELLED: frozenset(),
}


class Problem(Model):
    """Why something failed, in the words of RFC 9457 plus Colmeia's own ``code`` and ``hint``."""

    kind: str = Field(description="What the caller can do about it: invalid, not_found, conflict, busy, …")
    code: str = Field(description="Stable machine-readable code.")
    detail: str
    hint: str = ""


class Operation(Model):
    """One piece of long work: what was asked, by whom, how far it is, how it ended."""

    id: Id
    project: str
    kind: str = Field(examples=["vm.start"])
    target_kind: str = Field(examples=["vm", "image"])
    target_id: Id
    target_name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    state: OperationState
    progress: float = Field(default=0.0, ge=0.0, le=1.0, description="Share done, 0 to 1.")
    message: str = ""
    error: Problem | None = None
    cancel_requested: bool = False
    attempts: int = 0
    requested_by: str
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
