"""Consoles: the terminal, or a local port, tied to the server's WebSocket. The one asynchronous part of the CLI."""

import os
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import anyio
from anyio.abc import SocketAttribute, SocketStream

from colmeia.cli.escape import EscapeFilter
from colmeia.cli.options import Common
from colmeia.cli.output import note, say
from colmeia.client import ClientError, ServerUnreachable
from colmeia.client.aio import AsyncClient, Console

_CHUNK = 4096


def attach(common: Common, name: str, idle_s: float) -> int:
    """Tie stdin and stdout to the serial console until ``~.``, the guest's end, or silence after the input's end."""
    return _run(_attach, common, name, idle_s)


def forward_vnc(common: Common, name: str, port: int) -> int:
    """Listen on 127.0.0.1 and hand each viewer a screen console, until Ctrl-C."""
    return _run(_forward_vnc, common, name, port)


def _run(function: object, *arguments: object) -> int:
    try:
        code: int = anyio.run(function, *arguments)  # type: ignore[arg-type]
    except BaseExceptionGroup as group:  # several tasks fail together when the connection goes: one tells the story
        clients, rest = group.split(ClientError)
        if clients is None or rest is not None:
            raise
        raise _first(clients) from group
    return code


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _attach(common: Common, name: str, idle_s: float) -> int:
    async with AsyncClient(common.server, project=common.project) as client:
        vm = await client.vms.show(name)
        async with client.vms.console(vm["id"], "serial") as console:
            if sys.stdin.isatty():
                note(f"Connected to the serial console of VM {vm['name']}. Leave with ~. at the start of a line.")
            with _raw_terminal():
                await _Attachment(console, idle_s).run()
    if sys.stdin.isatty():
        note(f"\nLeft the console of VM {vm['name']}.")
    return 0


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Hand every key to the guest, Ctrl-C too; the terminal is restored whatever happens."""
    if not sys.stdin.isatty():
        yield
        return
    saved = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSAFLUSH, saved)


class _Attachment:
    """Two tasks, one per direction; the first to end ends both."""

    def __init__(self, console: Console, idle_s: float) -> None:
        self._console = console
        self._idle_s = idle_s
        self._heard = anyio.Event()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._guest_to_terminal, tasks.cancel_scope, name="console-output")
            tasks.start_soon(self._terminal_to_guest, tasks.cancel_scope, name="console-input")

    async def _guest_to_terminal(self, scope: anyio.CancelScope) -> None:
        async for data in self._console:
            self._heard.set()
            await anyio.to_thread.run_sync(_write_all, data)
        scope.cancel()

    async def _terminal_to_guest(self, scope: anyio.CancelScope) -> None:
        escape = EscapeFilter()
        async for typed in _stdin():
            data = escape.feed(typed)
            if data:
                await self._console.send(data)
            if escape.is_left:
                break
        else:
            await self._wait_silent()
        scope.cancel()

    async def _wait_silent(self) -> None:
        while True:
            self._heard = anyio.Event()
            with anyio.move_on_after(self._idle_s) as waited:
                await self._heard.wait()
            if waited.cancelled_caught:
                return


def _write_all(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def _stdin() -> AsyncIterator[bytes]:
    """Yield what is typed or piped. A plain file cannot be waited for and is always ready."""
    while True:
        with suppress(PermissionError):  # epoll's answer to a plain file
            await anyio.wait_readable(0)
        data = os.read(0, _CHUNK)
        if not data:
            return
        yield data


async def _forward_vnc(common: Common, name: str, port: int) -> int:
    async with AsyncClient(common.server, project=common.project) as client:
        vm = await client.vms.show(name)
        async with client.vms.console(vm["id"], "vnc"):
            pass  # asks the server whether there is a screen, before a viewer does
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
        taken = listener.extra(SocketAttribute.local_port)  # noqa: S610 - not Django's
        say(f"vnc://127.0.0.1:{taken}")
        note(f"The screen of VM {vm['name']}, for a VNC viewer on this machine. Ctrl-C ends it.")
        sys.stdout.flush()

        async def serve(viewer: SocketStream) -> None:
            async with viewer:
                try:
                    async with client.vms.console(vm["id"], "vnc") as console:
                        await _bridge(viewer, console)
                except* ClientError as errors:
                    note(f"Error: {_first(errors)}")

        async with listener:
            await listener.serve(serve)
    return 0


async def _bridge(viewer: SocketStream, console: Console) -> None:
    """Carry bytes both ways until either side ends."""

    async def to_viewer(scope: anyio.CancelScope) -> None:
        async for data in console:
            await viewer.send(data)
        scope.cancel()

    async def to_guest(scope: anyio.CancelScope) -> None:
        async for data in viewer:
            await console.send(data)
        scope.cancel()

    with suppress(anyio.BrokenResourceError, ServerUnreachable):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_viewer, tasks.cancel_scope, name="vnc-output")
            tasks.start_soon(to_guest, tasks.cancel_scope, name="vnc-input")
