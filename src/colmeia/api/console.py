"""Consoles over WebSocket: bytes both ways, binary frames."""

from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from colmeia.api.edge import caller, services_of
from colmeia.api.vm import check_running
from colmeia.control.identity import check_project, require
from colmeia.engine.interface import ByteStream
from colmeia.model.errors import ColmeiaError
from colmeia.model.identity import DEFAULT_PROJECT
from colmeia.store import documents

router = APIRouter(prefix="/v1/vms", tags=["console"])
POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1
REASON_MAX_BYTES = 120  # a close reason is at most 123 bytes (RFC 6455, 5.5)


async def _open(socket: WebSocket, vm: str, kind: str) -> ByteStream:
    identity = await caller(socket)
    require(identity, write=True)
    project = check_project(identity, socket.query_params.get("project") or identity.project or DEFAULT_PROJECT)
    services = services_of(socket)
    async with services.database.reading() as tx:
        found = await documents.vms.get(tx, vm, project=project)
    check_running(found)
    return await (services.engine.open_serial(found.id) if kind == "serial" else services.engine.open_vnc(found.id))


async def _serial(socket: WebSocket, vm: str) -> ByteStream | ColmeiaError:
    return await _opened(socket, vm, "serial")


async def _vnc(socket: WebSocket, vm: str) -> ByteStream | ColmeiaError:
    return await _opened(socket, vm, "vnc")


async def _opened(socket: WebSocket, vm: str, kind: str) -> ByteStream | ColmeiaError:
    try:
        return await _open(socket, vm, kind)
    except ColmeiaError as error:
        return error


@router.websocket("/{vm}/console/serial")
async def serial(socket: WebSocket, stream: Annotated[object, Depends(_serial)]) -> None:
    """The serial console. What was printed before is in the log."""
    await _bridge(socket, stream)


@router.websocket("/{vm}/console/vnc")
async def vnc(socket: WebSocket, stream: Annotated[object, Depends(_vnc)]) -> None:
    """The screen as RFB, for noVNC."""
    await _bridge(socket, stream)


async def _bridge(socket: WebSocket, stream: object) -> None:
    """Carry bytes until either side ends; an error is told in the close reason."""
    offered = socket.scope.get("subprotocols") or []
    await socket.accept(subprotocol="binary" if "binary" in offered else None)
    if isinstance(stream, ColmeiaError):
        reason = str(stream).encode()[:REASON_MAX_BYTES].decode(errors="ignore")
        await socket.close(POLICY_VIOLATION, reason)
        return
    opened: ByteStream = stream  # type: ignore[assignment]
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_to_viewer, socket, opened, tasks.cancel_scope, name="console-output")
            tasks.start_soon(_to_guest, socket, opened, tasks.cancel_scope, name="console-input")
    finally:
        with anyio.move_on_after(2, shield=True):
            await opened.aclose()
    if socket.client_state is WebSocketState.CONNECTED and socket.application_state is WebSocketState.CONNECTED:
        await socket.close(1000, "the console ended")


async def _to_viewer(socket: WebSocket, stream: ByteStream, scope: anyio.CancelScope) -> None:
    while data := await stream.receive():
        try:
            await socket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError):
            break
    scope.cancel()


async def _to_guest(socket: WebSocket, stream: ByteStream, scope: anyio.CancelScope) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            break
        data = message.get("bytes") or (message.get("text") or "").encode()
        if data:
            await stream.send(data)
    scope.cancel()
