"""The QEMU command line: a pure function of what is asked for and what the host has.

It opens nothing and asks nobody. What QEMU needs open is listed in the plan, and the arguments carry placeholders that
`render` fills with descriptor numbers, so QEMU never learns a path and the golden files never change with one. It
refuses what this host or machine type cannot do (Unsupported), before anything exists.

Where things sit is fixed by slot, so that adding a disk never renames a network card in the guest.
"""

import itertools
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from colmeia.engine.interface import LaunchRequest
from colmeia.engine.qemu.devices import BlockNode, Description, Device, Json, Netdev, Object, SocketChardev
from colmeia.model.base import MIB
from colmeia.model.block import BlockFormat, BlockSource
from colmeia.model.errors import Unavailable, Unsupported
from colmeia.model.host import HostFacts
from colmeia.model.vm import Accelerator, Aio, Disk, DiskBus, Firmware, Forward, Machine, Nic, Runtime, mac_for

QEMU_OLDEST = (7, 2, 0)
QEMU_HINT = "Install it: apt-get install qemu-system-x86 qemu-utils."
TCG_CPU = "qemu64"
"""What `auto` means without KVM. It runs every x86-64-v1 system (Debian 12 among them) and boots 7 % faster than
`max`, whose many features TCG must check; systems built for x86-64-v2 and later need `--cpu-model max`."""

MICROVM_TRANSPORTS = 8  # virtio-mmio slots of QEMU 7.2's microvm without a second I/O APIC
SPARE_ROOT_PORTS = 4  # eight cost 6 % of a boot under TCG (each bridge is walked twice), four nothing measurable
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_PLACEHOLDER = re.compile(r"@(fd|set):([a-z0-9.-]+)@")

# Slots of pcie.0. The chipset owns 00 and 1f.
_SLOT_VGA = 0x01
_SLOT_NIC = 0x02  # eight of them
_SLOT_COMPANIONS = 0x0A  # functions: serial, random numbers, balloon, SCSI controller
_SLOT_ROOT_PORTS = 0x0B
_SLOT_SEED = 0x0C
_SLOT_DISK = 0x0D  # sixteen of them, then eight functions in each of the two last slots
_DISKS_IN_OWN_SLOT = 16


class Access(StrEnum):
    READ = "read"
    WRITE = "write"  # read and write an existing file
    APPEND = "append"  # created when missing


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file QEMU is handed. `number` is its descriptor set; None when QEMU reads it through /proc/self/fd."""

    key: str
    path: str
    access: Access
    number: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a launch does: the arguments with placeholders, what to open, what to listen on, what was chosen."""

    argv: tuple[str, ...]
    files: tuple[OpenFile, ...]
    listeners: tuple[str, ...]
    forwards: tuple[Forward, ...]
    drops_privileges: bool
    runtime: Runtime


@dataclass(slots=True)
class _Parts:
    """The plan while it grows. Private to this module: `plan` returns a frozen value."""

    descriptions: list[Description] = field(default_factory=list)
    files: list[OpenFile] = field(default_factory=list)
    sets: int = 0

    def add(self, *descriptions: Description) -> None:
        self.descriptions.extend(descriptions)

    def hand_over(self, key: str, path: str, access: Access) -> str:
        """List a file and return the name under which QEMU opens it."""
        self.sets += 1
        self.files.append(OpenFile(key, path, access, self.sets))
        return f"/dev/fdset/{self.sets}"

    def reopen(self, key: str, path: str) -> str:
        """The same for the boot loader's plain `fopen`, which knows no descriptor sets: the file is world-readable."""
        self.files.append(OpenFile(key, path, Access.READ, None))
        return f"/proc/self/fd/@fd:{key}@"


def render(argv: Iterable[str], fds: Mapping[str, int]) -> list[str]:
    """Return the arguments with each placeholder replaced by the number of its descriptor."""

    def number(match: re.Match[str]) -> str:
        fd = fds.get(match[2])
        return match[0] if fd is None else str(fd)

    return [_PLACEHOLDER.sub(number, argument) for argument in argv]


def vm_uuid(vm_id: str) -> str:
    """Return the UUID the guest sees in its SMBIOS table; it also marks the process as this VM's."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"colmeia:{vm_id}"))


def plan(request: LaunchRequest, facts: HostFacts, logs: Path) -> Plan:
    """Decide everything about a launch. ``logs`` is the VM's log folder.

    Raises Unavailable (`qemu_missing`) and Unsupported (`qemu_too_old`, `kvm_unusable`, `firmware_missing`,
    `microvm_devices`, …).
    """
    _check_qemu(facts)
    runtime = _choose(request, facts)
    parts = _Parts()
    serial_log = parts.hand_over("serial-log", str(logs / "serial.log"), Access.APPEND)
    pci = request.spec.machine is Machine.Q35
    _add_memory(parts, request)
    machine = _machine(parts, request, facts, runtime)
    _add_disks(parts, request, runtime, pci=pci)
    _add_companions(parts, pci=pci)
    _add_nics(parts, request, pci=pci)
    _check_transports(parts, pci=pci)
    argv = (
        *_privileges(request, facts, runtime),
        facts.qemu_binary,
        "-name", f"guest={request.name},process=vm-{request.name}",
        "-uuid", vm_uuid(request.vm_id),
        "-nodefaults", "-no-user-config",
        "-sandbox", SANDBOX,
        *machine,
        *(("-S",) if request.paused else ()),
        "-display", "none", "-vnc", "none",
        *SocketChardev("qmp", "@fd:qmp@").argument(), "-mon", "chardev=qmp,mode=control",
        *SocketChardev("serial", "@fd:serial@", serial_log).argument(),
        *SocketChardev("agent", "@fd:agent@").argument(),
        *_handed_over(parts.files),
        *(word for description in parts.descriptions for word in description.argument()),
    )  # fmt: skip
    return Plan(
        argv=argv,
        files=tuple(parts.files),
        listeners=("qmp", "serial", "agent"),
        forwards=tuple(forward for nic in request.spec.nics for forward in nic.forwards),
        drops_privileges=facts.is_root,
        runtime=runtime,
    )


def _check_qemu(facts: HostFacts) -> None:
    if not facts.qemu_binary:
        raise Unavailable("qemu_missing", "QEMU is not installed on this host.", QEMU_HINT)
    if facts.qemu_version < QEMU_OLDEST:
        found = ".".join(map(str, facts.qemu_version))
        raise Unsupported("qemu_too_old", f"QEMU {found} is too old: Colmeia needs 7.2 or newer.", QEMU_HINT)


def _choose(request: LaunchRequest, facts: HostFacts) -> Runtime:
    """Settle every `auto` of the spec; what the user should know about it becomes a warning."""
    spec = request.spec
    accelerator, warnings = _accelerator(spec.accelerator, facts)
    microvm = spec.machine is Machine.MICROVM
    if microvm:
        warnings.append("microvm has no hot-plug, no graphics and no PCI bus: disks and NICs change at the next start.")
        if accelerator is Accelerator.TCG and facts.tsc_khz is None:
            warnings.append("The rate of the host's clock is unknown: a microvm may hang at boot without KVM.")
    firmware = spec.firmware or (Firmware.DIRECT if request.boot else Firmware.BIOS)
    if firmware is Firmware.DIRECT and request.boot is None:
        raise Unsupported(
            "kernel_missing",
            f"VM {request.name} is to boot a kernel directly, but its image brings none.",
            "Use firmware bios or uefi, or an image with a kernel such as the one of 'colmeia image build tiny'.",
        )
    if spec.cpu_model == "host" and accelerator is Accelerator.TCG:
        raise Unsupported("cpu_model_host", "CPU model 'host' needs KVM; this VM runs without it.", "Use auto or max.")
    automatic = "host" if accelerator is Accelerator.KVM else TCG_CPU
    aio = {disk.disk.name: _aio(disk.disk, facts) for disk in request.disks}
    return Runtime(
        accelerator=accelerator,
        machine_version="microvm" if microvm else facts.qemu_machine or "q35",
        cpu_model=automatic if spec.cpu_model == "auto" else spec.cpu_model,
        firmware=firmware,
        aio=aio,
        # virtio-mmio has the ioeventfd that an I/O thread needs only under KVM
        iothreads=1 if request.disks and not (microvm and accelerator is Accelerator.TCG) else 0,
        warnings=tuple(warnings),
    )


def _accelerator(wish: Accelerator, facts: HostFacts) -> tuple[Accelerator, list[str]]:
    if wish is Accelerator.TCG:
        return Accelerator.TCG, []
    if facts.kvm.usable:
        return Accelerator.KVM, []
    if wish is Accelerator.KVM:
        raise Unsupported(
            "kvm_unusable",
            f"KVM was asked for but does not run guests on this host: {facts.kvm.reason}.",
            "Use accelerator auto or tcg; 'colmeia doctor' says what to mend.",
        )
    return Accelerator.TCG, [f"Runs without KVM, much slower: {facts.kvm.reason}. 'colmeia doctor' says what to mend."]


def _aio(disk: Disk, facts: HostFacts) -> Aio:
    if disk.aio is Aio.IO_URING and not facts.io_uring:
        raise Unsupported("io_uring_missing", f"Disk {disk.name} asks for io_uring, which this host does not allow.")
    if disk.aio is Aio.AUTO:
        return Aio.IO_URING if facts.io_uring else Aio.THREADS
    return disk.aio


def _privileges(request: LaunchRequest, facts: HostFacts, runtime: Runtime) -> tuple[str, ...]:
    """Drop everything before QEMU is executed; `-runas` would come too late for the sandbox (QEMU dies of SIGSYS).

    Post-copy migration and background snapshots will need CAP_SYS_PTRACE as an ambient capability: it goes here.
    """
    if not facts.is_root:
        return ()
    kvm = runtime.accelerator is Accelerator.KVM and facts.kvm_gid is not None
    groups = f"--groups={facts.kvm_gid}" if kvm else "--clear-groups"
    return (
        "setpriv", f"--reuid={request.uid}", f"--regid={request.uid}", groups,
        "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
    )  # fmt: skip


def _machine(parts: _Parts, request: LaunchRequest, facts: HostFacts, runtime: Runtime) -> tuple[str, ...]:
    """Machine, accelerator, CPU, memory size and what it boots."""
    options = [runtime.machine_version, "memory-backend=ram"]
    if request.spec.machine is Machine.Q35:
        options += ["usb=off", "vmport=off"]
    options += _firmware(parts, request, facts, runtime)
    accelerator = "tcg,thread=multi" if runtime.accelerator is Accelerator.TCG else "kvm"
    return (
        "-machine", ",".join(options),
        "-accel", accelerator,
        "-cpu", runtime.cpu_model,
        "-smp", f"cpus={request.spec.cpus}",
        "-m", f"size={request.spec.memory // MIB}M",
        *_kernel(parts, request, facts, runtime),
    )  # fmt: skip


def _firmware(parts: _Parts, request: LaunchRequest, facts: HostFacts, runtime: Runtime) -> list[str]:
    if runtime.firmware is not Firmware.UEFI:
        return []
    if not facts.ovmf_code or request.uefi_vars is None:
        raise Unsupported("firmware_missing", "UEFI firmware is not installed on this host.", "apt-get install ovmf")
    code = parts.hand_over("uefi-code", facts.ovmf_code, Access.READ)
    variables = parts.hand_over("uefi-vars", request.uefi_vars, Access.WRITE)
    parts.add(
        BlockNode("file", "uefi-code", {"filename": code, "read-only": True}),
        BlockNode("file", "uefi-vars-file", {"filename": variables}),
        BlockNode("raw", "uefi-vars", {"file": "uefi-vars-file"}),
    )
    return ["pflash0=uefi-code", "pflash1=uefi-vars"]


def _kernel(parts: _Parts, request: LaunchRequest, facts: HostFacts, runtime: Runtime) -> tuple[str, ...]:
    if runtime.firmware is not Firmware.DIRECT or request.boot is None:
        return ()
    words = [request.boot.arguments, request.spec.kernel_arguments]
    if runtime.accelerator is Accelerator.TCG:
        # On a busy host the kernel's timer check misses ticks and panics ("IO-APIC + timer doesn't work"). Linux skips
        # the check by itself when it sees KVM.
        words.append("no_timer_check")
        if request.spec.machine is Machine.MICROVM and facts.tsc_khz:
            # microvm has neither HPET nor PM timer: without this the kernel cannot calibrate its clock and hangs.
            words.append(f"tsc_early_khz={facts.tsc_khz}")
    return (
        "-kernel", parts.reopen("kernel", request.boot.kernel),
        "-initrd", parts.reopen("initrd", request.boot.initrd),
        "-append", " ".join(word for word in words if word),
    )  # fmt: skip


def _add_memory(parts: _Parts, request: LaunchRequest) -> None:
    # Always shared memory by descriptor: fork, vhost-user and replacing QEMU under a running VM need it.
    parts.add(Object("memory-backend-memfd", "ram", {"size": request.spec.memory, "share": True}))


def _add_disks(parts: _Parts, request: LaunchRequest, runtime: Runtime, *, pci: bool) -> None:
    thread: dict[str, Json] = {"iothread": "io0"} if runtime.iothreads else {}
    if thread:
        parts.add(Object("iothread", "io0"))
    if any(disk.disk.bus is DiskBus.VIRTIO_SCSI for disk in request.disks):
        parts.add(virtio("scsi", "scsi0", thread, address=_function(_SLOT_COMPANIONS, 3), pci=pci))
    places = itertools.count()  # without the SCSI disks: function 0 of a slot must not be one of the missing
    for index, disk in enumerate(request.disks):
        node = _add_chain(parts, f"disk{index}", disk.source, runtime.aio[disk.disk.name])
        common: dict[str, Json] = {"drive": node, "bootindex": index + 1}
        if disk.disk.bus is DiskBus.VIRTIO_SCSI:
            scsi = {"bus": "scsi0.0", "scsi-id": index, "device_id": disk.disk.name[:20], **common}
            parts.add(Device("scsi-hd", f"dev-disk{index}", scsi))
            continue
        blk: dict[str, Json] = {**thread, "serial": disk.disk.name[:20], **common}
        parts.add(virtio("blk", f"dev-disk{index}", blk, address=_disk_address(next(places)), pci=pci))
    if request.seed is not None:
        source = BlockSource(path=request.seed, format=BlockFormat.RAW, read_only=True)
        node = _add_chain(parts, "seed", source, Aio.THREADS)
        parts.add(virtio("blk", "dev-seed", {"drive": node, "serial": "cidata"}, address=_slot(_SLOT_SEED), pci=pci))


def _add_chain(parts: _Parts, name: str, source: BlockSource, aio: Aio) -> str:
    """Describe an image and all it is copied from, deepest first; return the top node's name."""
    backing = _add_chain(parts, f"{name}.b", source.backing, aio) if source.backing else None
    read_only = source.read_only or name.endswith(".b")
    access = Access.READ if read_only else Access.WRITE
    filename = parts.hand_over(name, source.path, access)
    properties: dict[str, Json] = {"filename": filename, "aio": aio.value, "read-only": read_only, "discard": "unmap"}
    parts.add(BlockNode("file", f"{name}-file", properties))
    top: dict[str, Json] = {"file": f"{name}-file", "read-only": read_only, "discard": "unmap"}
    if source.format is BlockFormat.QCOW2:
        top["backing"] = backing
    parts.add(BlockNode(source.format.value, name, top))
    return name


def _add_companions(parts: _Parts, *, pci: bool) -> None:
    """What every VM has beside disks and NICs: console, agent channel, random numbers, balloon, screen, spare ports."""
    channel: dict[str, Json] = {"bus": "channels.0", "chardev": "agent", "name": "org.qemu.guest_agent.0"}
    balloon: dict[str, Json] = {"free-page-reporting": True}
    parts.add(
        Device("isa-serial", "dev-serial", {"chardev": "serial"}),
        virtio("serial", "channels", {"max_ports": 4}, address=_function(_SLOT_COMPANIONS, 0), pci=pci),
        Device("virtserialport", "dev-agent", channel),
        Object("rng-builtin", "rng0"),
        virtio("rng", "dev-rng", {"rng": "rng0"}, address=_function(_SLOT_COMPANIONS, 1), pci=pci),
        virtio("balloon", "dev-balloon", balloon, address=_function(_SLOT_COMPANIONS, 2), pci=pci),
    )
    if not pci:
        return
    parts.add(Device("VGA", "dev-vga", {"bus": "pcie.0", **_slot(_SLOT_VGA)}))
    for port in range(SPARE_ROOT_PORTS):
        where = {"bus": "pcie.0", **_function(_SLOT_ROOT_PORTS, port)}
        parts.add(Device("pcie-root-port", f"spare{port}", {**where, "chassis": port + 1, "slot": port + 1}))


def _add_nics(parts: _Parts, request: LaunchRequest, *, pci: bool) -> None:
    for index, nic in enumerate(request.spec.nics):
        parts.add(Netdev("user", f"net{index}", _user_network(nic)))
        card: dict[str, Json] = {"netdev": f"net{index}", "mac": nic.mac or mac_for(request.vm_id, index)}
        if pci:
            card["romfile"] = ""  # no network boot: its ROM costs time at every start
        parts.add(virtio("net", f"dev-net{index}", card, address=_slot(_SLOT_NIC + index), pci=pci))


def _user_network(nic: Nic) -> dict[str, Json]:
    rules = [f"{f.protocol}:{f.host_address}:{f.host_port}-:{f.guest_port}" for f in nic.forwards]
    return {"hostfwd": [{"str": rule} for rule in rules]} if rules else {}


def virtio(kind: str, name: str, properties: Mapping[str, Json], *, address: Mapping[str, Json], pci: bool) -> Device:
    """Describe a virtio device of this kind (blk, net, …) for PCI, at ``address``, or for microvm's virtio-mmio."""
    if not pci:
        shown = {key: value for key, value in properties.items() if key != "bootindex" or kind in ("blk", "net")}
        return Device(f"virtio-{kind}-device", name, shown)
    return Device(f"virtio-{kind}-pci", name, {"bus": "pcie.0", **address, **properties})


def _check_transports(parts: _Parts, *, pci: bool) -> None:
    used = sum(1 for part in parts.descriptions if isinstance(part, Device) and part.kind.endswith("-device"))
    if not pci and used > MICROVM_TRANSPORTS:
        raise Unsupported(
            "microvm_devices",
            f"A microvm holds {MICROVM_TRANSPORTS} virtio devices; this one would have {used} (3 are its own).",
            "Use fewer disks and NICs, or machine q35.",
        )


def _slot(slot: int) -> dict[str, Json]:
    return {"addr": f"{slot:02x}"}


def _function(slot: int, function: int) -> dict[str, Json]:
    where: dict[str, Json] = {"addr": f"{slot:02x}.{function}"}
    return {**where, "multifunction": True} if function == 0 else where


def _disk_address(index: int) -> dict[str, Json]:
    if index < _DISKS_IN_OWN_SLOT:
        return _slot(_SLOT_DISK + index)
    slot, function = divmod(index - _DISKS_IN_OWN_SLOT, 8)
    return _function(_SLOT_DISK + _DISKS_IN_OWN_SLOT + slot, function)


def _handed_over(files: Iterable[OpenFile]) -> Iterable[str]:
    for file in files:
        if file.number is not None:
            yield "-add-fd"
            yield f"fd=@fd:{file.key}@,set={file.number}"
