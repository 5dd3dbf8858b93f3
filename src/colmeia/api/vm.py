"""VMs over HTTP."""

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from colmeia.api.edge import (
    Caller,
    Cursor,
    IdempotencyKey,
    InProject,
    Limit,
    NameOrId,
    Page,
    TheServices,
    page,
    problems,
    rendered,
    submitted,
)
from colmeia.control import guest
from colmeia.control import vm as control
from colmeia.control.guest import Exec, ExecResult
from colmeia.control.identity import require
from colmeia.control.services import Services
from colmeia.model.base import Model
from colmeia.model.errors import Conflict, Invalid
from colmeia.model.operation import Operation
from colmeia.model.vm import Action, Vm, VmCreate, VmPatch, VmState
from colmeia.store import documents
from colmeia.store.database import Connection

router = APIRouter(prefix="/v1/vms", tags=["vm"], responses=problems(404))
LOG_TAIL_BYTES = 1 << 20


class StartRequest(Model):
    paused: bool = Field(default=False, description="Leave the guest's CPUs standing: `resume` sets them going.")


class StopRequest(Model):
    force: bool = Field(default=False, description="End it at once, as if the power was cut.")
    timeout_s: float = Field(
        default=60.0, ge=0, le=3600, description="How long the guest may take before it is forced."
    )


@router.get("", response_model=Page[Vm])
async def list_vms(
    services: TheServices, project: InProject, limit: Limit = 1000, cursor: Cursor = None, state: VmState | None = None
) -> Response:
    """List VMs by name."""
    equals = {} if state is None else {"state": state.value}
    async with services.database.reading() as tx:
        return page(*await documents.vms.page(tx, project=project, equals=equals, after=cursor, limit=limit))


@router.post("", status_code=202, response_model=Operation, responses=problems(404, 409))
async def create_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    wish: VmCreate,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Create a VM: its disks become copy-on-write children of their images."""
    require(identity, write=True)

    async def ask(tx: Connection) -> Operation:
        return await control.request_create(services, tx, identity, project, wish)

    return await submitted(request, identity, idempotency_key, ask)


@router.get("/{vm}", response_model=Vm)
async def show_vm(services: TheServices, project: InProject, vm: NameOrId) -> Response:
    """Show one VM. The ETag is its revision."""
    found = await _get(services, project, vm)
    return rendered(found, headers={"ETag": f'"{found.revision}"'})


@router.patch("/{vm}", response_model=Vm, responses=problems(404, 409, 412))
async def change_vm(
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    patch: VmPatch,
    if_match: Annotated[str | None, Header(max_length=40)] = None,
) -> Response:
    """Change the spec. What changes holds from the next start."""
    require(identity, write=True)
    changed = await control.change(services, project, vm, patch, expected_revision=_revision(if_match))
    return rendered(changed, headers={"ETag": f'"{changed.revision}"'})


@router.delete("/{vm}", status_code=202, response_model=Operation, responses=problems(404, 409))
async def delete_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    force: Annotated[bool, Query(description="Also when it runs: it is ended first.")] = False,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Delete a VM and its disks."""
    return await _act(request, services, identity, project, vm, Action.DELETE, {"force": force}, idempotency_key)


@router.post("/{vm}/start", status_code=202, response_model=Operation, responses=problems(404, 409))
async def start_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    how: StartRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Start a VM."""
    arguments = (how or StartRequest()).model_dump()
    return await _act(request, services, identity, project, vm, Action.START, arguments, idempotency_key)


@router.post("/{vm}/stop", status_code=202, response_model=Operation, responses=problems(404, 409))
async def stop_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    how: StopRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Power off: press the ACPI button, then end it after the deadline."""
    arguments = (how or StopRequest()).model_dump()
    return await _act(request, services, identity, project, vm, Action.STOP, arguments, idempotency_key)


@router.post("/{vm}/restart", status_code=202, response_model=Operation, responses=problems(404, 409))
async def restart_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    how: StopRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Stop, then start with the present spec."""
    arguments = (how or StopRequest()).model_dump()
    return await _act(request, services, identity, project, vm, Action.RESTART, arguments, idempotency_key)


@router.post("/{vm}/reset", status_code=202, response_model=Operation, responses=problems(404, 409))
async def reset_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Press the reset button."""
    return await _act(request, services, identity, project, vm, Action.RESET, {}, idempotency_key)


@router.post("/{vm}/pause", status_code=202, response_model=Operation, responses=problems(404, 409))
async def pause_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Stop the guest's CPUs; memory and devices stay."""
    return await _act(request, services, identity, project, vm, Action.PAUSE, {}, idempotency_key)


@router.post("/{vm}/resume", status_code=202, response_model=Operation, responses=problems(404, 409))
async def resume_vm(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    vm: NameOrId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Set the guest's CPUs going again."""
    return await _act(request, services, identity, project, vm, Action.RESUME, {}, idempotency_key)


@router.post("/{vm}/exec", response_model=ExecResult, responses=problems(404, 409))
async def execute(services: TheServices, identity: Caller, project: InProject, vm: NameOrId, wish: Exec) -> Response:
    """Run a command in the guest, through its agent."""
    require(identity, write=True)
    return rendered(await guest.execute(services, await _get(services, project, vm), wish))


@router.get(
    "/{vm}/logs",
    response_class=Response,
    responses={
        200: {
            "description": "What the serial console printed.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
async def logs(
    services: TheServices,
    project: InProject,
    vm: NameOrId,
    lines: Annotated[int, Query(ge=0, le=100_000)] = 200,
    follow: Annotated[bool, Query(description="Go on until you hang up.")] = False,
) -> Response:
    """Read the serial console's log."""
    path = anyio.Path(services.engine.serial_log((await _get(services, project, vm)).id))
    text, offset = await _tail(path, lines)
    if not follow:
        return Response(text, media_type="text/plain; charset=utf-8")
    return StreamingResponse(_follow(path, text, offset), media_type="text/plain; charset=utf-8")


@router.get(
    "/{vm}/screenshot",
    response_class=Response,
    responses={
        200: {
            "description": "The screen.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems(404, 409),
    },
)
async def screenshot(services: TheServices, project: InProject, vm: NameOrId) -> Response:
    """Take a picture of the screen."""
    found = await _get(services, project, vm)
    check_running(found)
    return Response(await services.engine.screenshot(found.id), media_type="image/png")


def check_running(vm: Vm) -> None:
    """Raise Conflict unless QEMU runs."""
    if vm.state not in (VmState.RUNNING, VmState.PAUSED):
        raise Conflict(
            "vm_state",
            f"VM {vm.name} is {vm.state.value}: it has no screen and no console.",
            f"colmeia vm start {vm.name}",
        )


async def _get(services: Services, project: str, name_or_id: str) -> Vm:
    async with services.database.reading() as tx:
        return await documents.vms.get(tx, name_or_id, project=project)


async def _act(
    request: Request,
    services: Services,
    identity: Caller,
    project: str,
    vm: str,
    action: Action,
    arguments: dict[str, object],
    key: str | None,
) -> Response:
    require(identity, write=True)

    async def ask(tx: Connection) -> Operation:
        return await control.request_action(services, tx, identity, project, vm, action, arguments)

    return await submitted(request, identity, key, ask)


def _revision(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().strip('"')
    if not text.isascii() or not text.isdigit():
        raise Invalid("if_match", "If-Match is not a revision of a VM.", "Send the ETag that GET returned.")
    return int(text)


async def _tail(path: anyio.Path, lines: int) -> tuple[bytes, int]:
    """Return the last lines (at most 1 MiB) and the offset where they end."""
    if not await path.exists():
        return b"", 0
    async with await path.open("rb") as file:
        end = await file.seek(0, 2)
        await file.seek(max(0, end - LOG_TAIL_BYTES))
        text = await file.read(LOG_TAIL_BYTES)
    kept = text.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept), end


async def _follow(path: anyio.Path, first: bytes, offset: int) -> AsyncIterator[bytes]:
    yield first
    while True:
        if await path.exists():
            async with await path.open("rb") as file:
                await file.seek(offset)
                text = await file.read(LOG_TAIL_BYTES)
            offset += len(text)
            if text:
                yield text
        await anyio.sleep(0.2)
