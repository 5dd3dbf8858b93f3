"""Consoles: the serial hub, which lets any number of viewers share one serial port, and plain byte streams.

QEMU serves one connection per character device, so the daemon keeps it and hands out copies. The hub connects with the
first viewer and leaves with the last. It never lets a slow viewer hold up the guest: such a viewer loses bytes.
"""

import asyncio
import contextlib
import socket
from pathlib import Path

import anyio
from anyio.abc import SocketStream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from colmeia.model.errors import Unavailable

_CHUNK = 16 * 1024
_CHUNKS_PER_VIEWER = 256


class SocketBytes:
    """A connected socket as a `ByteStream`."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream

    @classmethod
    async def wrap(cls, connected: socket.socket) -> "SocketBytes":
        """Take over a connected UNIX socket."""
        return cls(await anyio.abc.UNIXSocketStream.from_socket(connected))

    async def receive(self) -> bytes:
        try:
            return await self._stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return b""

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise _closed() from error

    async def aclose(self) -> None:
        await self._stream.aclose()


class SerialHub:
    """The one connection to a VM's serial port and its viewers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: SocketStream | None = None
        self._pump: asyncio.Task[None] | None = None
        self._viewers: set[SerialViewer] = set()
        self._opening = anyio.Lock()
        self._sending = anyio.Lock()

    async def open(self) -> "SerialViewer":
        """Return a new viewer, which sees what the guest writes from now on. Raises Unavailable (`console_closed`)."""
        async with self._opening:
            if self._stream is None:
                try:
                    self._stream = await anyio.connect_unix(self._path)
                except OSError as error:
                    raise _closed() from error
                self._pump = asyncio.create_task(self._copy(self._stream), name=f"serial {self._path}")
            viewer = SerialViewer(self)
            self._viewers.add(viewer)
            return viewer

    async def _copy(self, stream: SocketStream) -> None:
        try:
            while True:
                data = await stream.receive(_CHUNK)
                for viewer in tuple(self._viewers):
                    viewer.offer(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        finally:
            for viewer in tuple(self._viewers):
                viewer.end()
            if self._stream is stream:
                self._stream = None
            with anyio.CancelScope(shield=True):
                await stream.aclose()

    async def send(self, data: bytes) -> None:
        async with self._sending:
            if self._stream is None:
                raise _closed()
            try:
                await self._stream.send(data)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise _closed() from error

    async def leave(self, viewer: "SerialViewer") -> None:
        self._viewers.discard(viewer)
        if not self._viewers:
            await self.aclose()

    async def aclose(self) -> None:
        """End all viewers and let go of the port."""
        pump, self._pump = self._pump, None
        self._stream = None
        if pump is not None:
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.wait([pump]))


class SerialViewer:
    """One viewer of a serial port, as a `ByteStream`."""

    def __init__(self, hub: SerialHub) -> None:
        self._hub = hub
        self._in: MemoryObjectSendStream[bytes]
        self._out: MemoryObjectReceiveStream[bytes]
        self._in, self._out = anyio.create_memory_object_stream[bytes](_CHUNKS_PER_VIEWER)

    def offer(self, data: bytes) -> None:
        with contextlib.suppress(anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._in.send_nowait(data)

    def end(self) -> None:
        self._in.close()

    async def receive(self) -> bytes:
        try:
            return await self._out.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return b""

    async def send(self, data: bytes) -> None:
        await self._hub.send(data)

    async def aclose(self) -> None:
        self._in.close()
        self._out.close()
        await self._hub.leave(self)


def _closed() -> Unavailable:
    return Unavailable("console_closed", "The console is closed: the VM does not run any more.", "Start the VM.")
