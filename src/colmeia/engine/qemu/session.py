"""One QMP session per VM: commands with a deadline, events in order, reconnection while the process lives.

`qemu.qmp` speaks the protocol. This module adds what a daemon needs: a lost session is opened again by itself; events
go to one callback in the order QEMU sent them, and none is kept; every failure becomes one of our errors, with
OutcomeUnknown when a command was on its way as the session ended.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import Runstate

from colmeia.model.errors import ColmeiaError, Conflict, OutcomeUnknown, Unavailable, Unsupported

_COMMAND_S = 10.0
_RECONNECT_S = (0.05, 0.2, 1.0, 5.0)
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # it logs each end as an error; we report it

OnEvent = Callable[[str, Mapping[str, Any]], None]


class Session:
    """The QMP session of one QEMU, over the socket at ``path``.

    ``on_event`` is called with each event's name and data; ``on_reconnect`` after a lost session was opened again
    (events may have been missed: look).
    """

    def __init__(self, name: str, path: Path, on_event: OnEvent, on_reconnect: Callable[[], None]) -> None:
        self._name = name
        self._path = path
        self._on_event = on_event
        self._on_reconnect = on_reconnect
        self._client = QMPClient(name)
        self._connected = anyio.Event()
        self._lost = anyio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._keeping = anyio.CancelScope()
        self._descriptors = anyio.Lock()

    async def open(self) -> None:
        """Connect and wait until QEMU answers; the deadline is the caller's. Raises Unavailable (`qmp_lost`)."""
        await self._connect()
        self.keep_trying()

    def keep_trying(self) -> None:
        """Keep the session open from now on, whether or not the first attempt succeeded."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"qmp {self._name}")

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = _COMMAND_S
    ) -> Any:
        """Run one QMP command and return its answer.

        Raises Conflict (`qemu_refused`), Unsupported (QEMU does not know it), Unavailable (`qmp_silent`: not connected
        in time) and OutcomeUnknown (the session ended, or the answer was late).
        """
        sent = False
        try:
            with anyio.fail_after(timeout_s):
                await self._connected.wait()
                sent = True
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise _refusal(command, error) from error
        except TimeoutError:
            raise _silent(command, sent=sent, timeout_s=timeout_s) from None
        except QMPError as error:
            message = f"The session with QEMU ended during {command}."
            raise OutcomeUnknown("qmp_lost", message, "Look at the VM.") from error

    async def give_descriptor(self, name: str, fd: int) -> None:
        """Hand a descriptor to QEMU under a name (`getfd`). The caller's copy stays open."""
        async with self._descriptors:
            await self._connected.wait()
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                raise Unavailable("qmp_lost", "The session with QEMU has ended.", "Try again.") from error
            await self.execute("getfd", {"fdname": name})

    async def add_to_set(self, fd: int) -> int:
        """Hand a descriptor to QEMU as a new descriptor set and return the set's number (for /dev/fdset/N)."""
        async with self._descriptors:
            await self._connected.wait()
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                raise Unavailable("qmp_lost", "The session with QEMU has ended.", "Try again.") from error
            answer = await self.execute("add-fd")
            return int(answer["fdset-id"])

    async def wait_lost(self) -> None:
        """Wait for the end of the present session: all its events have been delivered then."""
        if self._connected.is_set():
            await self._lost.wait()

    async def aclose(self) -> None:
        """Let go of QEMU, which runs on."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._keeping.cancel()
            await asyncio.wait([keeper])
        await self._disconnect()

    def _take(self, event: Message) -> bool:
        """Handle an event where it arrives; False keeps it out of the library's ever-growing history."""
        name, data = event.get("event"), event.get("data")
        if isinstance(name, str):
            self._on_event(name, data if isinstance(data, dict) else {})
        return False

    async def _connect(self) -> None:
        """Connect with a fresh client: `qemu.qmp` 0.0.6 leaves one whose connecting was interrupted unusable."""
        client = QMPClient(self._name)
        client.events.event_filter = self._take
        # By descriptor of its folder, because a path may be longer than the 107 bytes of a socket's name.
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        connecting = asyncio.create_task(client.connect(f"/proc/self/fd/{folder}/{self._path.name}"))
        try:
            await asyncio.wait([connecting])
        finally:
            if not connecting.done():  # we were cancelled: tell it once, and let it clean up in peace
                connecting.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([connecting])
            os.close(folder)
        if (error := connecting.exception()) is not None:
            raise Unavailable("qmp_lost", f"QEMU of VM {self._name} does not answer: {error}.") from error
        self._client = client
        self._lost = anyio.Event()
        self._connected.set()

    async def _disconnect(self) -> None:
        """Bring the client back to idle. The library raises what ended the session here; we know it already."""
        with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
            await self._client.disconnect()

    async def _keep(self) -> None:
        with self._keeping:
            while True:
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()
                self._connected = anyio.Event()
                await self._disconnect()
                self._lost.set()
                await self._reconnect()
                self._on_reconnect()

    async def _reconnect(self) -> None:
        attempt = 0
        while True:
            await anyio.sleep(_RECONNECT_S[min(attempt, len(_RECONNECT_S) - 1)])
            attempt += 1
            with contextlib.suppress(ColmeiaError, OSError, TimeoutError), anyio.fail_after(_COMMAND_S):
                return await self._connect()


def _refusal(command: str, error: ExecuteError) -> ColmeiaError:
    if error.error_class == "CommandNotFound":
        return Unsupported("qemu_command", f"This QEMU does not know {command}.", "Install a newer QEMU.")
    return Conflict("qemu_refused", f"QEMU refused {command}: {error}")


def _silent(command: str, *, sent: bool, timeout_s: float) -> ColmeiaError:
    if sent:
        return OutcomeUnknown("qmp_silent", f"QEMU did not answer {command} in {timeout_s:g} s.", "Look at the VM.")
    return Unavailable("qmp_silent", f"No session with QEMU for {command} in {timeout_s:g} s.", "Try again.")
