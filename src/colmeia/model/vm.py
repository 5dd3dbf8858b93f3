"""Virtual machines: what is asked of one (spec), what it is (state), and which moves are allowed."""

from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address
from typing import Annotated

from pydantic import Field, StringConstraints, field_validator, model_validator

from colmeia.model.base import GIB, MIB, TIB, Id, Model, Name, Size
from colmeia.model.errors import Conflict


class VmState(StrEnum):
    """What a VM is. Written by one function (`control.vm.set_state`), after looking at QEMU.

    A crash of the daemon leaves a transient state (creating, starting, stopping, deleting) behind together with its
    unfinished operation, which runs again from its start. The stable ones are checked against QEMU at start.
    """

    CREATING = (
        "creating"  # entered with the create operation; left when its disks exist, or with the row when they cannot
    )
    STOPPED = "stopped"  # no process
    STARTING = "starting"  # entered by the start operation; left when QEMU answers
    RUNNING = "running"  # QEMU runs and the guest's CPUs run
    PAUSED = "paused"  # QEMU runs, the guest's CPUs stand
    STOPPING = "stopping"  # asked to power off; left when the process is gone
    CRASHED = "crashed"  # the process ended without being asked: see `died`
    DELETING = "deleting"  # entered with the delete operation; the row goes last


_ALIVE = (VmState.RUNNING, VmState.PAUSED)
VM_TRANSITIONS: dict[VmState, frozenset[VmState]] = {
    VmState.CREATING: frozenset({VmState.STOPPED, VmState.STARTING, VmState.DELETING}),
    VmState.STOPPED: frozenset({VmState.STARTING, VmState.DELETING, *_ALIVE}),
    VmState.STARTING: frozenset({*_ALIVE, VmState.STOPPED, VmState.CRASHED, VmState.STOPPING, VmState.DELETING}),
    VmState.RUNNING: frozenset({VmState.PAUSED, VmState.STOPPING, VmState.STOPPED, VmState.CRASHED, VmState.DELETING}),
    VmState.PAUSED: frozenset({VmState.RUNNING, VmState.STOPPING, VmState.STOPPED, VmState.CRASHED, VmState.DELETING}),
    VmState.STOPPING: frozenset({VmState.STOPPED, VmState.CRASHED, VmState.STARTING, VmState.DELETING, *_ALIVE}),
    VmState.CRASHED: frozenset({VmState.STARTING, VmState.STOPPED, VmState.DELETING, *_ALIVE}),
    VmState.DELETING: frozenset(),
}


class Action(StrEnum):
    """What a user may ask of a VM that exists."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"
    DELETE = "delete"


ALLOWED_FROM: dict[Action, frozenset[VmState]] = {
    Action.START: frozenset({VmState.STOPPED, VmState.CRASHED}),
    Action.STOP: frozenset({*_ALIVE, VmState.STARTING, VmState.STOPPING}),
    Action.RESTART: frozenset({*_ALIVE}),
    Action.RESET: frozenset({*_ALIVE}),
    Action.PAUSE: frozenset({VmState.RUNNING}),
    Action.RESUME: frozenset({VmState.PAUSED}),
    Action.DELETE: frozenset({VmState.STOPPED, VmState.CRASHED, VmState.DELETING}),
}


def check_action(name: str, state: VmState, action: Action) -> None:
    """Raise Conflict with what to do instead when ``action`` does not fit ``state``."""
    if state in ALLOWED_FROM[action]:
        return
    possible = ", ".join(sorted(a.value for a, states in ALLOWED_FROM.items() if state in states))
    raise Conflict(
        "vm_state",
        f"Cannot {action.value} VM {name}: it is {state.value}.",
        f"Possible now: {possible}." if possible else "Wait until its operation ends: colmeia operation list.",
    )


class Machine(StrEnum):
    Q35 = "q35"
    MICROVM = "microvm"


class Firmware(StrEnum):
    BIOS = "bios"
    UEFI = "uefi"
    DIRECT = "direct"


class Accelerator(StrEnum):
    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class DiskBus(StrEnum):
    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"


class Aio(StrEnum):
    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"


class CrashPolicy(StrEnum):
    RESTART = "restart"
    STOP = "stop"


class Disk(Model):
    """One disk. With an image it starts as a copy-on-write child of it, at least as large."""

    name: Name = "root"
    image: str | None = Field(default=None, max_length=63, description="Name or id of the image it starts from.")
    size: Size | None = Field(default=None, description="Absent: the image's size.")
    bus: DiskBus = DiskBus.VIRTIO_BLK
    aio: Aio = Aio.AUTO

    @model_validator(mode="after")
    def _has_content(self) -> "Disk":
        if self.image is None and self.size is None:
            raise ValueError(f"disk {self.name!r} needs a size or an image")
        if self.size is not None and not MIB <= self.size <= 64 * TIB:
            raise ValueError(f"the size of disk {self.name!r} lies between 1 MiB and 64 TiB")
        return self


class Forward(Model):
    """A port of the host that leads into the guest (user-mode networking)."""

    host_address: str = Field(default="127.0.0.1", pattern=r"^\d{1,3}(\.\d{1,3}){3}$")
    host_port: int = Field(ge=1, le=65535)
    guest_port: int = Field(ge=1, le=65535)
    protocol: Annotated[str, StringConstraints(pattern="^(tcp|udp)$")] = "tcp"

    @field_validator("host_address")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return str(IPv4Address(value))


class Nic(Model):
    """A network card on QEMU's own NAT (10.0.2.0/24, the guest is .15)."""

    mac: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$",
        description="Derived from the VM's id if absent.",
    )
    forwards: tuple[Forward, ...] = Field(default=(), max_length=64)


class CloudInit(Model):
    """What cloud-init in the guest is told at first boot (NoCloud)."""

    hostname: Name | None = Field(default=None, description="Absent: the VM's name.")
    user: str | None = Field(default=None, pattern=r"^[a-z_][a-z0-9_-]{0,31}$")
    ssh_keys: tuple[Annotated[str, StringConstraints(max_length=16_000, pattern=r"^[^\r\n]+$")], ...] = Field(
        default=(), max_length=64
    )
    user_data: str | None = Field(default=None, max_length=64 * 1024, description="Replaces user and ssh_keys.")
    network_config: str | None = Field(default=None, max_length=64 * 1024)


class VmSpec(Model):
    """What is asked for. Pure wish: nothing in it is found by looking."""

    cpus: int = Field(default=1, ge=1, le=512)
    memory: Size = Field(default=512 * MIB)
    machine: Machine = Machine.Q35
    firmware: Firmware | None = Field(default=None, description="Absent: direct for an image with a kernel, else bios.")
    cpu_model: str = Field(
        default="auto",
        pattern=r"^[A-Za-z0-9_.-]{1,60}$",
        description="auto (host under KVM, qemu64 under TCG), host, max, or a QEMU model.",
    )
    accelerator: Accelerator = Accelerator.AUTO
    disks: tuple[Disk, ...] = Field(default=(), max_length=24)
    nics: tuple[Nic, ...] = Field(default=(Nic(),), max_length=8)
    cloud_init: CloudInit | None = None
    kernel_arguments: str = Field(default="", max_length=2000, description="Added to a direct-boot image's own.")
    autostart: bool = Field(default=False, description="Start it with the host.")
    on_crash: CrashPolicy = CrashPolicy.RESTART

    @field_validator("memory")
    @classmethod
    def _sane_memory(cls, value: int) -> int:
        if not 16 * MIB <= value <= 16 * TIB:
            raise ValueError("memory lies between 16 MiB and 16 TiB")
        if value % MIB:
            raise ValueError("memory is a whole number of MiB")
        return value

    @model_validator(mode="after")
    def _names_and_ports_are_unique(self) -> "VmSpec":
        names = [disk.name for disk in self.disks]
        if len(set(names)) != len(names):
            raise ValueError("two disks have the same name")
        ports = [(f.host_address, f.host_port, f.protocol) for nic in self.nics for f in nic.forwards]
        if len(set(ports)) != len(ports):
            raise ValueError("two forwards use the same host port")
        macs = [nic.mac for nic in self.nics if nic.mac]
        if len(set(macs)) != len(macs):
            raise ValueError("two NICs have the same MAC address")
        if self.machine is Machine.MICROVM and self.firmware is Firmware.UEFI:
            raise ValueError("microvm boots a kernel directly or by its small BIOS, not by UEFI: use machine q35")
        return self


class Died(Model):
    """Why QEMU ended, as far as it can be known."""

    at: datetime
    reason: str = Field(examples=["killed by signal 9 (SIGKILL)", "exit code 1", "guest shut down"])
    exit_code: int | None = Field(default=None, description="Unknown when another daemon had started the process.")
    log_tail: tuple[str, ...] = Field(default=(), description="Last lines QEMU wrote.")


class Runtime(Model):
    """What was chosen when QEMU was last started, and what it is now. Found by looking, never asked for."""

    pid: int | None = None
    started_at: datetime | None = None
    accelerator: Accelerator | None = None
    machine_version: str = ""
    cpu_model: str = ""
    firmware: Firmware | None = None
    aio: dict[str, Aio] = Field(default_factory=dict, description="By disk name.")
    iothreads: int = 0
    warnings: tuple[str, ...] = ()


class Vm(Model):
    """A virtual machine as the API shows it."""

    id: Id
    project: str
    name: Name
    revision: int = Field(default=1, description="Grows with each change of the spec; the ETag.")
    spec: VmSpec
    state: VmState
    desired: VmState = Field(
        default=VmState.STOPPED, description="running, paused or stopped: what was last asked for."
    )
    runtime: Runtime = Runtime()
    died: Died | None = None
    uid: int = Field(description="The host user its QEMU runs as.")
    created_at: datetime


class VmCreate(Model):
    """Ask for a VM."""

    name: Name
    spec: VmSpec = VmSpec()
    start: bool = Field(default=False, description="Start it once it exists.")


class VmPatch(Model):
    """Change a VM. Fields that are absent stay; the change holds from the next start."""

    cpus: int | None = Field(default=None, ge=1, le=512)
    memory: Size | None = None
    autostart: bool | None = None
    on_crash: CrashPolicy | None = None
    cpu_model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,60}$")
    accelerator: Accelerator | None = None


def mac_for(vm_id: str, index: int) -> str:
    """Return the NIC's MAC: QEMU's and KVM's conventional prefix 52:54:00 and 24 bits of the VM's id."""
    tail = (int(vm_id[-6:], 16) + index) & 0xFFFFFF
    return f"52:54:00:{tail >> 16:02x}:{tail >> 8 & 255:02x}:{tail & 255:02x}"


def check_fits(spec: VmSpec, *, cpus: int, memory_bytes: int) -> None:
    """Raise Conflict when the host can never hold the VM: more memory, or eight times more vCPUs, than it has."""
    if spec.memory > memory_bytes:
        raise Conflict(
            "memory_exceeds_host",
            f"{spec.memory / GIB:.1f} GiB of memory were asked for; this host has {memory_bytes / GIB:.1f} GiB.",
            "Ask for less memory.",
        )
    if spec.cpus > 8 * cpus:
        raise Conflict(
            "cpus_exceed_host",
            f"{spec.cpus} vCPUs were asked for; this host has {cpus} CPUs.",
            f"Ask for at most {8 * cpus}.",
        )
