"""What the house asks of a hypervisor. One implementation: `colmeia.engine.qemu`.

The engine knows processes, sockets and QMP. It knows no database, no project and no user: it is handed values and
answers with values. It trusts what it observes (the process, QMP), never what it remembers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from colmeia.model.base import Model
from colmeia.model.block import BlockSource, BootFiles
from colmeia.model.vm import Died, Disk, Runtime, VmSpec, VmState


class OpenDisk(Model):
    """A disk of the spec and where its bytes are."""

    disk: Disk
    source: BlockSource


class LaunchRequest(Model):
    """Everything a start needs, as values."""

    vm_id: str
    name: str
    uid: int
    spec: VmSpec
    disks: tuple[OpenDisk, ...] = ()
    seed: str | None = None  # path of the NoCloud ISO
    boot: BootFiles | None = None  # set for firmware `direct`
    uefi_vars: str | None = None  # path of the VM's own variables file, set for firmware `uefi`
    paused: bool = False


class Observation(NamedTuple):
    """What was seen of a VM: STOPPED (no process), RUNNING or PAUSED."""

    state: VmState
    pid: int | None


class ByteStream(Protocol):
    """A console: bytes both ways until it ends."""

    async def receive(self) -> bytes:
        """Return the next bytes; b'' at the end."""

    async def send(self, data: bytes) -> None: ...

    async def aclose(self) -> None: ...


OnExit = Callable[[str, Died, bool], None]
"""Called with the VM's id, why its QEMU ended, and whether that was expected (guest power-off, or asked by us)."""

OnState = Callable[[str, VmState], None]
"""Called with the VM's id and RUNNING or PAUSED when QEMU changes between them."""


class Engine(Protocol):
    """Lifecycle of QEMU processes. All calls are safe to repeat; a cancelled call leaves the process observable."""

    async def start(self, request: LaunchRequest, *, deadline_s: float) -> Runtime:
        """Ensure QEMU runs and answers; leaves no process behind when it raises.

        Raises Unavailable (QEMU missing, or it ended: code `qemu_exited` with its last words), Conflict (host port in
        use), Unsupported (accelerator or machine not to be had here).
        """

    async def adopt(self, vm_id: str) -> Observation:
        """Reconnect to a QEMU that an earlier daemon started. Called once per VM at daemon start."""

    async def observe(self, vm_id: str) -> Observation: ...

    async def pause(self, vm_id: str) -> None: ...

    async def resume(self, vm_id: str) -> None: ...

    async def reset(self, vm_id: str) -> None: ...

    async def press_power_button(self, vm_id: str) -> None: ...

    async def wait_gone(self, vm_id: str, *, timeout_s: float) -> bool:
        """Wait for the end of the process; False when it still runs after `timeout_s`."""

    async def kill(self, vm_id: str) -> None:
        """End QEMU at once and return when the process is gone. Nothing happens when it is not there."""

    async def forget(self, vm_id: str) -> None:
        """Remove the run folder and logs of a VM that does not run. Called by delete."""

    async def screenshot(self, vm_id: str) -> bytes:
        """Return the screen as PNG."""

    async def open_serial(self, vm_id: str) -> ByteStream:
        """Open the serial console; any number of viewers see the same output."""

    async def open_vnc(self, vm_id: str) -> ByteStream:
        """Open a fresh RFB connection."""

    async def agent(self, vm_id: str, command: str, arguments: dict[str, Any] | None, *, timeout_s: float) -> Any:
        """Run one guest-agent command. Raises Conflict (code `agent_silent`) when the agent does not answer."""

    def serial_log(self, vm_id: str) -> Path:
        """Where the serial console's output is kept."""

    async def aclose(self) -> None:
        """Let go of all VMs without touching them: they go on running."""
