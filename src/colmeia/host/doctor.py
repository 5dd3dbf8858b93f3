"""Says what this machine can do, what is missing, why that matters and how to mend it: `colmeia doctor`.

One small function per line of the answer, in the table at the end. Reads only, changes nothing, needs no daemon and no
database, and always answers every line: what cannot be examined is a line that says so.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from colmeia.model.base import GIB
from colmeia.model.host import Check, HostFacts, Verdict

QEMU_OLDEST = (7, 2, 0)  # Debian 12's, the oldest that is tested
_MEMORY_WANTED = 2 * GIB
_DISK_WANTED = 10 * GIB
_PROGRAMS = {"qemu-img": "qemu-utils", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}


class Host(NamedTuple):
    """What is examined: the facts, the file system they came from, and the folder that keeps Colmeia's state."""

    facts: HostFacts
    root: Path
    state: Path

    def read(self, path: str) -> str:
        """Return the text of a file such as ``sys/kernel/mm/ksm/run``; empty when there is none."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return ""


class Finding(NamedTuple):
    verdict: Verdict
    finding: str
    mend: str = ""


OK, DEGRADED, MISSING = Verdict.OK, Verdict.DEGRADED, Verdict.MISSING


def _cpu(host: Host) -> Finding:
    flags = _cpu_flags(host)
    for flag, name in (("vmx", "VT-x (vmx)"), ("svm", "AMD-V (svm)")):
        if flag in flags:
            return Finding(OK, f"{name}, {host.facts.cpus} CPUs")
    return Finding(
        MISSING,
        f"neither vmx nor svm among the CPU flags, {host.facts.cpus} CPUs",
        "Switch on VT-x or AMD-V (SVM) in the firmware set-up; inside a VM, ask its host for nested virtualization.",
    )


def _kvm(host: Host) -> Finding:
    kvm = host.facts.kvm
    if kvm.usable:
        return Finding(OK, f"/dev/kvm {kvm.reason} ({kvm.duration_ms:.0f} ms)")
    if kvm.present:
        finding = f"/dev/kvm is present but unusable: {kvm.reason} ({kvm.duration_ms:.0f} ms)"
        if not os.access(host.root / "dev/kvm", os.R_OK | os.W_OK):
            return Finding(DEGRADED, finding, "VMs run on TCG meanwhile. Add this user to the group of /dev/kvm.")
        return Finding(DEGRADED, finding, "VMs run on TCG meanwhile. KVM needs hardware virtualization: see cpu.")
    module = "kvm_amd" if "svm" in _cpu_flags(host) else "kvm_intel"
    return Finding(MISSING, "there is no /dev/kvm", f"VMs run on TCG meanwhile. Run: modprobe {module}")


def _qemu(host: Host) -> Finding:
    facts = host.facts
    if not facts.qemu_binary:
        return Finding(MISSING, "qemu-system-x86_64 is not installed", "Run: apt-get install qemu-system-x86")
    version = ".".join(map(str, facts.qemu_version))
    if facts.qemu_version < QEMU_OLDEST:
        oldest = ".".join(map(str, QEMU_OLDEST))
        return Finding(DEGRADED, f"QEMU {version} is older than {oldest}", f"Install QEMU {oldest} or newer.")
    if not facts.qemu_machine:
        return Finding(DEGRADED, f"QEMU {version} has no versioned q35 machine", "Install the distribution's QEMU.")
    return Finding(OK, f"QEMU {version}, {facts.qemu_machine}, {facts.qemu_binary}")


def _programs(host: Host) -> Finding:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = {program: package for program, package in _PROGRAMS.items() if not shutil.which(program, path=path)}
    if not missing:
        return Finding(OK, ", ".join(_PROGRAMS))
    verdict = MISSING if "qemu-img" in missing else DEGRADED
    return Finding(
        verdict, f"not installed: {', '.join(missing)}", f"Run: apt-get install {' '.join(missing.values())}"
    )


def _uefi(host: Host) -> Finding:
    if host.facts.ovmf_code:
        return Finding(OK, host.facts.ovmf_code)
    return Finding(MISSING, "OVMF is not installed", "Run: apt-get install ovmf")


def _io_uring(host: Host) -> Finding:
    if host.facts.io_uring:
        return Finding(OK, "a ring can be set up")
    if host.read("proc/sys/kernel/io_uring_disabled") in ("1", "2"):
        return Finding(DEGRADED, "forbidden by sysctl", "Run: sysctl kernel.io_uring_disabled=0")
    return Finding(DEGRADED, "this kernel, or its policy, does not offer io_uring", "Use Linux 5.10 or newer.")


def _tun(host: Host) -> Finding:
    if host.facts.tun:
        return Finding(OK, "/dev/net/tun opens")
    if (host.root / "dev/net/tun").exists():
        return Finding(DEGRADED, "/dev/net/tun may not be opened", "Run as root, or give this user the device.")
    return Finding(MISSING, "there is no /dev/net/tun", "Run: modprobe tun")


def _vhost_net(host: Host) -> Finding:
    if host.facts.vhost_net:
        return Finding(OK, "/dev/vhost-net opens")
    if (host.root / "dev/vhost-net").exists():
        return Finding(DEGRADED, "/dev/vhost-net may not be opened", "Run as root, or give this user the device.")
    return Finding(MISSING, "there is no /dev/vhost-net", "Run: modprobe vhost_net")


def _iommu(host: Host) -> Finding:
    folder = host.root / "sys/kernel/iommu_groups"
    groups = len(list(folder.iterdir())) if folder.is_dir() else 0
    if groups:
        return Finding(OK, f"{groups} groups")
    return Finding(
        MISSING,
        "no IOMMU groups",
        "Switch on VT-d or AMD-Vi in the firmware set-up and add intel_iommu=on to the kernel's command line.",
    )


def _huge_pages(host: Host) -> Finding:
    transparent = host.read("sys/kernel/mm/transparent_hugepage/shmem_enabled")
    policy = transparent.partition("[")[2].partition("]")[0]
    reserved = _meminfo(host).get("HugePages_Total", 0)
    finding = f"{reserved} reserved, transparent ones for shared memory: {policy or 'not offered'}"
    if reserved or policy in ("always", "advise", "within_size", "force"):
        return Finding(OK, finding)
    return Finding(
        DEGRADED,
        finding,
        "Run: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        if policy
        else "Reserve some: sysctl vm.nr_hugepages=N (2 MiB each).",
    )


def _ksm(host: Host) -> Finding:
    match host.read("sys/kernel/mm/ksm/run"):
        case "":
            return Finding(MISSING, "this kernel has no KSM", "Use a kernel with CONFIG_KSM, if memory is tight.")
        case "1":
            return Finding(OK, f"merges pages, {host.read('sys/kernel/mm/ksm/pages_sharing') or 0} saved")
        case _:
            return Finding(OK, "present, switched off: tenants cannot guess each other's pages by timing")


def _cgroups(host: Host) -> Finding:
    controllers = host.read("sys/fs/cgroup/cgroup.controllers").split()
    wanted = ("cpu", "io", "memory", "pids")
    if absent := [name for name in wanted if name not in controllers]:
        if controllers:
            return Finding(DEGRADED, f"cgroup v2 without {', '.join(absent)}", "Delegate these controllers to here.")
        if (host.root / "sys/fs/cgroup/memory").is_dir():
            return Finding(DEGRADED, "cgroup v1 only", "Boot with systemd.unified_cgroup_hierarchy=1.")
        return Finding(MISSING, "no cgroup controllers", "Mount cgroup2 on /sys/fs/cgroup.")
    return Finding(OK, f"v2 with {', '.join(controllers)}")


def _confinement(host: Host) -> Finding:
    if host.read("sys/fs/selinux/enforce") == "1":
        return Finding(OK, "SELinux, enforcing")
    if host.read("sys/module/apparmor/parameters/enabled") == "Y":
        return Finding(OK, "AppArmor, enabled")
    return Finding(
        MISSING,
        "neither AppArmor nor SELinux is active",
        "Each QEMU still has its own user and -sandbox. For a second wall boot with apparmor=1 security=apparmor.",
    )


def _privileges(host: Host) -> Finding:
    if host.facts.is_root:
        return Finding(OK, "root")
    return Finding(DEGRADED, f"uid {os.geteuid()}, not root", "Run `colmeia serve` as root.")


def _memory(host: Host) -> Finding:
    available = _meminfo(host).get("MemAvailable", 0) * 1024
    finding = f"{available / GIB:.1f} GiB available of {host.facts.memory_bytes / GIB:.1f} GiB"
    if available >= _MEMORY_WANTED:
        return Finding(OK, finding)
    return Finding(DEGRADED, finding, f"Free or add memory: at least {_MEMORY_WANTED // GIB} GiB is comfortable.")


def _disk(host: Host) -> Finding:
    folder = next(path for path in (host.state, *host.state.parents) if path.is_dir())
    usage = shutil.disk_usage(folder)
    finding = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB at {folder}"
    if usage.free >= _DISK_WANTED:
        return Finding(OK, finding)
    return Finding(
        DEGRADED, finding, f"Free some, or put the state elsewhere: {_DISK_WANTED // GIB} GiB to begin with."
    )


def _cpu_flags(host: Host) -> frozenset[str]:
    line = next((line for line in host.read("proc/cpuinfo").splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def _meminfo(host: Host) -> dict[str, int]:
    """Return /proc/meminfo's figures: KiB, or pages for the HugePages_ lines."""
    rows = (line.replace(":", " ").split() for line in host.read("proc/meminfo").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


_CHECKS: tuple[tuple[str, Callable[[Host], Finding], str], ...] = (
    ("cpu", _cpu, "KVM needs the CPU's virtualization extension."),
    ("kvm", _kvm, "With KVM guests run at the speed of the CPU; without it QEMU translates, 10 to 50 times slower."),
    ("qemu", _qemu, "QEMU is what runs a VM."),
    ("programs", _programs, "qemu-img makes disks; mmdebstrap and mke2fs build images."),
    ("uefi", _uefi, "VMs with firmware uefi need OVMF; others do without."),
    ("io_uring", _io_uring, "The fastest way to the disks; without it QEMU uses a pool of threads."),
    ("tun", _tun, "Networks between VMs need tap devices; user-mode networking does without."),
    ("vhost_net", _vhost_net, "Moves packets in the kernel instead of in QEMU: less CPU time per packet."),
    ("iommu", _iommu, "Needed to hand a PCI device to a VM."),
    ("huge_pages", _huge_pages, "Large guests run faster when their memory is in large pages."),
    ("ksm", _ksm, "Merges equal pages of different VMs; saves memory, costs CPU time and some isolation."),
    ("cgroups", _cgroups, "Limits and counts what each VM uses."),
    ("confinement", _confinement, "A second wall around a QEMU that has been broken out of."),
    ("privileges", _privileges, "Only root can give each QEMU a user of its own."),
    ("memory", _memory, "Guests live in it."),
    ("disk", _disk, "Images and volumes live on it."),
)


def examine(facts: HostFacts, *, state: Path = Path("/var/lib/colmeia"), root: Path = Path("/")) -> tuple[Check, ...]:
    """Return one check per line of the doctor, always all of them, in this order. Takes a few milliseconds.

    ``state`` is the folder (existing or to be) whose disk is judged; ``root`` the file system that is looked at.
    """
    host = Host(facts, root, state)
    return tuple(_check(host, name, find, why) for name, find, why in _CHECKS)


def _check(host: Host, name: str, find: Callable[[Host], Finding], why: str) -> Check:
    try:
        found = find(host)
    except OSError as error:
        found = Finding(DEGRADED, f"could not be examined: {error}", "Run the doctor as root.")
    return Check(name=name, verdict=found.verdict, finding=found.finding, why=why, mend=found.mend)
