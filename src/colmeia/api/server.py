"""Sockets: the local one, which knows its peer, and TCP with TLS."""

import os
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from colmeia.api.edge import PEER_PREFIX
from colmeia.model.errors import Conflict, Unavailable

SHUTDOWN_S = 2
_PEERCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


def _peer(transport: Any) -> tuple[str, int] | None:
    """Return (`unix:UID`, pid) of the process at the other end of a local socket, as the kernel knows it."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    pid, uid, _gid = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return f"{PEER_PREFIX}{uid}", pid


class _PeerHttp(HttpToolsProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.client = _peer(transport) or self.client


class _PeerWebSocket(WebSocketsSansIOProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.client = _peer(transport) or self.client


class _Server(uvicorn.Server):
    """Leaves the signals to the daemon: there are two servers in one loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def local_server(app: FastAPI, path: Path) -> tuple[uvicorn.Server, socket.socket]:
    """Bind the local socket (0660, root's and its group's). A stale file of a daemon that died is replaced."""
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o117)
    try:
        bound.bind(str(path))
    finally:
        os.umask(old)
    return _Server(_config(app)), bound


def tcp_server(app: FastAPI, listen: str, certificate: Path, key: Path) -> tuple[uvicorn.Server, socket.socket]:
    """Bind the HTTPS address. Raises Conflict (`address_in_use`), Unavailable when the address is not ours."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, int(port)))
    except OSError as error:
        bound.close()
        kind = Conflict if error.errno == 98 else Unavailable
        raise kind(
            "address_in_use", f"Cannot listen on {listen}: {error.strerror}.", "Set `listen` to a free address."
        ) from error
    config = _config(app)
    config.ssl_certfile, config.ssl_keyfile = str(certificate), str(key)
    config.ssl_version = ssl.PROTOCOL_TLS_SERVER
    return _Server(config), bound


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=_PeerHttp,
        ws=_PeerWebSocket,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        ws_max_size=1 << 20,
        proxy_headers=False,  # else a header could claim to be the local socket's peer
    )


async def serve_until(server: uvicorn.Server, bound: socket.socket, stop: anyio.Event) -> None:
    """Serve on a bound socket until ``stop``; then let requests end for a moment."""
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            await stop.wait()
            server.should_exit = True

        tasks.start_soon(watch, name="http-stop")
        await server.serve(sockets=[bound])
        if not stop.is_set():
            raise Unavailable("server_ended", "The HTTP server ended by itself.", "See the log.")
