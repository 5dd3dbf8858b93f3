"""Operations over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from colmeia.api.edge import Caller, InProject, Limit, Page, TheServices, page, problems, rendered
from colmeia.control.identity import require
from colmeia.model.base import ID_PATTERN
from colmeia.model.operation import Operation, OperationState
from colmeia.store import history

router = APIRouter(prefix="/v1/operations", tags=["operation"], responses=problems(404))
OperationId = Annotated[str, Path(pattern=ID_PATTERN)]


@router.get("", response_model=Page[Operation])
async def list_operations(
    services: TheServices,
    project: InProject,
    limit: Limit = 100,
    cursor: Annotated[int | None, Query(ge=0, le=2**31)] = None,
    state: OperationState | None = None,
    target: Annotated[str | None, Query(pattern=ID_PATTERN, description="Id of the object it works on.")] = None,
) -> Response:
    """List operations, newest first."""
    equals = {key: value for key, value in (("state", state), ("target_id", target)) if value is not None}
    async with services.database.reading() as tx:
        return page(*await history.page_operations(tx, project=project, equals=equals, before=cursor, limit=limit))


@router.get("/{operation}", response_model=Operation)
async def show_operation(
    services: TheServices,
    identity: Caller,
    operation: OperationId,
    wait: Annotated[float, Query(ge=0, le=300, description="Seconds to wait for its end.")] = 0.0,
) -> Response:
    """Show an operation, or wait for its end and then show it."""
    return rendered(await services.operations.wait(operation, project=identity.project, timeout_s=wait))


@router.post("/{operation}/cancel", response_model=Operation, responses=problems(404, 409))
async def cancel_operation(services: TheServices, identity: Caller, operation: OperationId) -> Response:
    """Ask a running operation to end and undo what it did."""
    require(identity, write=True)
    return rendered(await services.operations.cancel(operation, project=identity.project))
