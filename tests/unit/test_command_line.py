"""The QEMU command line, against reviewed golden files and a few sentences about what it refuses.

After a wanted change: ``COLMEIA_WRITE_GOLDEN=1 pytest tests/unit/test_command_line.py``, then review the difference.
"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colmeia.engine.interface import LaunchRequest, OpenDisk
from colmeia.engine.qemu.command import MICROVM_TRANSPORTS, TCG_CPU, Access, Plan, plan, render
from colmeia.engine.qemu.devices import BlockNode, Device
from colmeia.model.base import GIB, MIB
from colmeia.model.block import BlockFormat, BlockSource, BootFiles
from colmeia.model.errors import Unavailable, Unsupported
from colmeia.model.host import HostFacts, KvmProbe
from colmeia.model.vm import Accelerator, Aio, Disk, DiskBus, Firmware, Forward, Machine, Nic, VmSpec

GOLDEN = Path(__file__).parent / "golden"
LOGS = Path("/var/log/colmeia/0123456789abcdef")
FACTS = HostFacts(
    cpus=2,
    memory_bytes=24 * GIB,
    qemu_binary="/usr/bin/qemu-system-x86_64",
    qemu_version=(7, 2, 22),
    qemu_machine="pc-q35-7.2",
    kvm=KvmProbe(present=True, usable=False, reason="guest ring 0 runs at 4 M insn/s: emulated, not native"),
    io_uring=True,
    tsc_khz=2_600_000,
    ovmf_code="/usr/share/OVMF/OVMF_CODE_4M.fd",
    ovmf_vars="/usr/share/OVMF/OVMF_VARS_4M.fd",
)
KVM_FACTS = FACTS.model_copy(update={"kvm": KvmProbe(present=True, usable=True, reason=""), "kvm_gid": 104})
BOOT = BootFiles(kernel="/images/k", initrd="/images/i", arguments="console=ttyS0")
ROOT = Disk(name="root", size=GIB)


def source(name: str, backing: BlockSource | None = None) -> BlockSource:
    return BlockSource(path=f"/pool/{name}.qcow2", format=BlockFormat.QCOW2, backing=backing)


def request(spec: VmSpec, **more: object) -> LaunchRequest:
    base = source("image").model_copy(update={"read_only": True})
    disks = tuple(OpenDisk(disk=disk, source=source(disk.name, base)) for disk in spec.disks)
    values = {"vm_id": "0123456789abcdef", "name": "web1", "uid": 64001, "spec": spec, "disks": disks, **more}
    return LaunchRequest.model_validate(values)


FORWARDS = (Forward(host_port=2222, guest_port=22), Forward(host_port=5353, guest_port=53, protocol="udp"))
CASES: dict[str, tuple[LaunchRequest, HostFacts]] = {
    "q35-direct": (request(VmSpec(disks=(ROOT,), kernel_arguments="quiet"), boot=BOOT), FACTS),
    "q35-bios-kvm": (
        request(
            VmSpec(
                cpus=4,
                memory=2 * GIB,
                disks=(ROOT, Disk(name="data", size=GIB, bus=DiskBus.VIRTIO_SCSI, aio=Aio.THREADS)),
                nics=(Nic(forwards=FORWARDS), Nic(mac="02:00:00:00:00:01")),
            ),
            seed="/vms/seed.iso",
        ),
        KVM_FACTS,
    ),
    "q35-uefi-paused": (
        request(VmSpec(disks=(ROOT,), nics=(), firmware=Firmware.UEFI), uefi_vars="/vms/vars.fd", paused=True),
        FACTS,
    ),
    "microvm": (request(VmSpec(machine=Machine.MICROVM, disks=(ROOT,), memory=128 * MIB), boot=BOOT), FACTS),
    "unprivileged-daemon": (request(VmSpec(nics=())), FACTS.model_copy(update={"is_root": False})),
}


def written(made: Plan) -> str:
    lines: list[str] = []
    for word in made.argv:
        if lines and not word.startswith("-") and lines[-1].startswith("-") and " " not in lines[-1]:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    for file in made.files:
        lines.append(f"# open {file.key} {file.path} {file.access.value} set={file.number}")
    lines.append(f"# chosen {made.runtime.model_dump_json(exclude_defaults=True)}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_command_line_equals_its_reviewed_golden_file(name: str) -> None:
    asked, facts = CASES[name]
    found = written(plan(asked, facts, LOGS))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("COLMEIA_WRITE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


def test_render_fills_in_descriptors_and_nothing_else() -> None:
    assert render(["fd=@fd:qmp@,x", "@fd:unknown@", "a@b"], {"qmp": 7}) == ["fd=7,x", "@fd:unknown@", "a@b"]


def test_hot_plug_and_command_line_carry_the_same_data() -> None:
    device = Device("virtio-blk-pci", "d0", {"drive": "n0"})
    assert json.loads(device.argument()[1]) == device.qmp() == {"driver": "virtio-blk-pci", "id": "d0", "drive": "n0"}
    assert BlockNode("raw", "n0", {"file": "f0"}).qmp()["node-name"] == "n0"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_node_says_its_backing_and_only_the_top_is_writable(depth: int) -> None:
    chain = None
    for level in range(depth + 1):
        chain = source(f"n{level}", chain)
    assert chain is not None
    disk = OpenDisk(disk=ROOT, source=chain)
    made = plan(request(VmSpec(disks=(ROOT,)), disks=(disk,)), FACTS, LOGS)
    nodes = [json.loads(made.argv[i + 1]) for i, word in enumerate(made.argv) if word == "-blockdev"]
    layers = [node for node in nodes if node["driver"] == "qcow2"]
    assert len(layers) == depth + 1
    assert [node["backing"] for node in layers] == [None, *(node["node-name"] for node in layers[:-1])]
    assert [node["read-only"] for node in layers] == [True] * depth + [False]
    writable = [file.path for file in made.files if file.access is Access.WRITE]
    assert writable == [chain.path]


def test_auto_without_usable_kvm_warns_with_the_measured_reason() -> None:
    runtime = plan(request(VmSpec()), FACTS, LOGS).runtime
    assert runtime.accelerator is Accelerator.TCG
    assert runtime.cpu_model == TCG_CPU
    assert FACTS.kvm.reason in runtime.warnings[0]


def test_auto_with_usable_kvm_takes_it_and_the_host_cpu() -> None:
    runtime = plan(request(VmSpec()), KVM_FACTS, LOGS).runtime
    assert (runtime.accelerator, runtime.cpu_model, runtime.warnings) == (Accelerator.KVM, "host", ())


@pytest.mark.parametrize(
    ("spec", "facts", "code"),
    [
        (VmSpec(accelerator=Accelerator.KVM), FACTS, "kvm_unusable"),
        (VmSpec(cpu_model="host"), FACTS, "cpu_model_host"),
        (VmSpec(), FACTS.model_copy(update={"qemu_version": (6, 2, 0)}), "qemu_too_old"),
        (VmSpec(), FACTS.model_copy(update={"qemu_binary": ""}), "qemu_missing"),
        (VmSpec(firmware=Firmware.DIRECT), FACTS, "kernel_missing"),
        (VmSpec(firmware=Firmware.UEFI), FACTS.model_copy(update={"ovmf_code": ""}), "firmware_missing"),
        (VmSpec(machine=Machine.MICROVM, nics=(Nic(),) * 8), FACTS, "microvm_devices"),
        (
            VmSpec(disks=(Disk(size=GIB, aio=Aio.IO_URING),)),
            FACTS.model_copy(update={"io_uring": False}),
            "io_uring_missing",
        ),
    ],
)
def test_what_the_host_cannot_do_is_refused_with_a_code(spec: VmSpec, facts: HostFacts, code: str) -> None:
    with pytest.raises((Unsupported, Unavailable)) as caught:
        plan(request(spec), facts, LOGS)
    assert caught.value.code == code


DISKS = st.lists(st.sampled_from(DiskBus), max_size=24).map(
    lambda buses: tuple(Disk(name=f"d{index}", size=GIB, bus=bus) for index, bus in enumerate(buses))
)
SCSI_ON_THE_FIRST_FUNCTION = tuple(
    Disk(name=f"d{index}", size=GIB, bus=DiskBus.VIRTIO_SCSI if index == 16 else DiskBus.VIRTIO_BLK)
    for index in range(18)
)


@settings(deadline=None)
@given(disks=DISKS, nics=st.integers(0, 8), seed=st.booleans())
@example(disks=SCSI_ON_THE_FIRST_FUNCTION, nics=0, seed=False)
def test_no_two_devices_share_an_address_or_a_name(disks: tuple[Disk, ...], nics: int, seed: bool) -> None:
    asked = request(VmSpec(disks=disks, nics=(Nic(),) * nics), seed="/seed.iso" if seed else None)
    made = plan(asked, FACTS, LOGS)
    devices = [json.loads(made.argv[i + 1]) for i, word in enumerate(made.argv) if word == "-device"]
    addresses = [device["addr"] for device in devices if "addr" in device]
    slots = {address.partition(".")[0] for address in addresses}
    assert len(set(addresses)) == len(addresses)
    assert all(0 < int(slot, 16) < 0x1F for slot in slots)
    assert all(f"{slot}" not in addresses or f"{slot}.0" not in addresses for slot in slots)
    for slot in slots:  # a function is only seen when function 0 says that there are more
        functions = [address for address in addresses if address.startswith(f"{slot}.")]
        assert not functions or f"{slot}.0" in functions
    names = [device["id"] for device in devices]
    assert len(set(names)) == len(names)


@settings(deadline=None)
@given(nics=st.integers(0, 8), disks=st.integers(0, 8))
def test_a_microvm_never_gets_more_devices_than_it_has_transports(nics: int, disks: int) -> None:
    spec = VmSpec(
        machine=Machine.MICROVM,
        nics=(Nic(),) * nics,
        disks=tuple(Disk(name=f"d{index}", size=GIB) for index in range(disks)),
    )
    if 3 + nics + disks > MICROVM_TRANSPORTS:
        with pytest.raises(Unsupported):
            plan(request(spec, boot=BOOT), FACTS, LOGS)
    else:
        assert plan(request(spec, boot=BOOT), FACTS, LOGS).runtime.machine_version == "microvm"
