"""Looks at this host once and writes down what the pure decisions need: CPUs, QEMU, KVM, firmware, kernel abilities.

Reading only: nothing is loaded, created or changed. What cannot be found is absent in the answer, never an error;
whether that matters is for the doctor and for the engine to say. Asks by doing (open the device, set up the ring)
rather than by version numbers, because containers and policies forbid what the kernel could do.
"""

import ctypes
import json
import os
import platform
import re
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from colmeia.host.kvm import DEVICE, probe_kvm, read_tsc_khz
from colmeia.host.machine_code import measure_tsc_khz
from colmeia.host.process import find_program
from colmeia.model.base import Model
from colmeia.model.errors import Unavailable
from colmeia.model.host import HostFacts

QEMU = "qemu-system-x86_64"
OVMF = (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd"))  # Debian's package ovmf

_QEMU_TIMEOUT_S = 10
_VERSION = re.compile(r"version (\d+)\.(\d+)\.(\d+)")
_Q35 = re.compile(r"^pc-q35-(\d+)\.(\d+)(?:\.(\d+))?\s", re.MULTILINE)
_IO_URING_SETUP = 425  # asm-generic/unistd.h; the same on every architecture
_IO_URING_PARAMS_SIZE = 120  # struct io_uring_params of linux/io_uring.h


class _Qemu(Model):
    """What a QEMU binary says of itself, and which binary it was: only another one is asked again."""

    binary: str
    mtime_ns: int
    size: int
    version: tuple[int, int, int]
    machine: str


def find_facts(cache: Path | None = None, *, qemu: str = QEMU) -> HostFacts:
    """Return what this host can do. Blocks for about 30 ms, 150 ms when QEMU has to be asked; never raises.

    ``cache`` is a file that keeps QEMU's answers between calls; absent, or not writable, QEMU is asked each time.
    """
    with ThreadPoolExecutor(thread_name_prefix="facts") as threads:
        asked = threads.submit(_find_qemu, qemu, cache)
        kvm = probe_kvm()
        tsc_khz = read_tsc_khz() or measure_tsc_khz()
        found = asked.result()
    has_ovmf = all(path.is_file() for path in OVMF)
    return HostFacts(
        architecture=platform.machine(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        qemu_binary=found.binary if found else "",
        qemu_version=found.version if found else (0, 0, 0),
        qemu_machine=found.machine if found else "",
        kvm=kvm,
        kvm_gid=_group_of(DEVICE),
        io_uring=_has_io_uring(),
        vhost_net=_opens(Path("/dev/vhost-net")),
        tun=_opens(Path("/dev/net/tun")),
        tsc_khz=tsc_khz,
        ovmf_code=str(OVMF[0]) if has_ovmf else "",
        ovmf_vars=str(OVMF[1]) if has_ovmf else "",
        is_root=os.geteuid() == 0,
    )


def _find_qemu(name: str, cache: Path | None) -> _Qemu | None:
    try:
        binary = find_program(name)
        seen = Path(binary).stat()
    except (Unavailable, OSError):
        return None
    known = _read_cache(cache)
    if known and (known.binary, known.mtime_ns, known.size) == (binary, seen.st_mtime_ns, seen.st_size):
        return known
    with ThreadPoolExecutor(2) as threads:
        version, machines = threads.map(lambda argument: _ask(binary, *argument), (["--version"], ["-machine", "help"]))
    numbers = _VERSION.search(version)
    if numbers is None:
        return None
    found = _Qemu(
        binary=binary,
        mtime_ns=seen.st_mtime_ns,
        size=seen.st_size,
        version=(int(numbers[1]), int(numbers[2]), int(numbers[3])),
        machine=newest_q35(machines),
    )
    _write_cache(cache, found)
    return found


def newest_q35(machines: str) -> str:
    """Return the newest versioned q35 machine in the output of ``-machine help``; empty when there is none."""
    versions = [(int(m[1]), int(m[2]), int(m[3] or 0), m[0].strip()) for m in _Q35.finditer(machines)]
    return max(versions)[3] if versions else ""


def _ask(binary: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [binary, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_QEMU_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _read_cache(cache: Path | None) -> _Qemu | None:
    try:
        return _Qemu.model_validate_json(cache.read_bytes()) if cache else None
    except (OSError, ValidationError):
        return None


def _write_cache(cache: Path | None, found: _Qemu) -> None:
    if cache is None:
        return
    scratch = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(found.model_dump()))
        scratch.replace(cache)
    except OSError:  # a cache that cannot be kept costs time, nothing else
        scratch.unlink(missing_ok=True)


def _opens(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _group_of(device: Path) -> int | None:
    try:
        found = device.stat()
    except OSError:
        return None
    readable_and_writable = stat.S_IRGRP | stat.S_IWGRP
    return found.st_gid if found.st_mode & readable_and_writable == readable_and_writable else None


def _has_io_uring() -> bool:
    """Set up a ring of one entry: the kernel may lack it, a sysctl or seccomp may forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(_IO_URING_PARAMS_SIZE))
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True
