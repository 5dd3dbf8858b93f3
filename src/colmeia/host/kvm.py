"""Finds out whether KVM *runs a guest*, by running one; a device file alone proves nothing.

There are hosts whose /dev/kvm has no hardware beneath it: it interprets the guest's kernel instruction by instruction,
a thousand times slower than the CPU, and gives up at instructions every distribution's kernel needs. The probe starts
a guest of a hundred bytes in 64-bit kernel mode and looks at two things:

* speed: a countdown loop, beside the same loop in this process. Hardware gives a ratio near 1, an interpreter of
  instructions below 1/1000. A ratio and no absolute figure, so that the answer is right on a slow machine, on a
  loaded one, and on a host that is emulated itself but whose KVM works (the lab);
* correctness: instructions a stock kernel needs, with their results.

Everything is bounded: the guest by its own instruction count, the calls by a deadline that also interrupts the kernel.
`probe_kvm` never raises; what cannot be examined is unusable, with the reason. x86-64 only.

All numbers and layouts: linux/kvm.h and the KVM API documentation (Documentation/virt/kvm/api.rst).
"""

import ctypes
import fcntl
import mmap
import os
import platform
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from colmeia.host.machine_code import COUNT_DOWN, INSTRUCTIONS_PER_COUNT, measure_loop_rate
from colmeia.model.host import KvmProbe

DEVICE = Path("/dev/kvm")

_API_VERSION = 12  # the only stable one


def _ioc(direction: int, number: int, size: int) -> int:
    """Build an ioctl number of KVM's magic 0xAE (asm-generic/ioctl.h: 1 writes to, 2 reads from the kernel)."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


_U64 = struct.Struct("<Q")
_MEMORY_REGION = struct.Struct("<IIQQQ")  # slot, flags, guest address, size, host address
_SEGMENT = struct.Struct("<QIHBBBBBBBBBB")  # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, pad
_SREGS_SIZE = 312  # 8 segments, 2 descriptor tables of 16, then at _SREGS_CONTROL 7 registers, 4 words of interrupts
_SREGS_CONTROL = 8 * _SEGMENT.size + 2 * 16
_CONTROL = struct.Struct("<7Q")  # cr0, cr2, cr3, cr4, cr8, efer, apic_base
_REGS = struct.Struct("<18Q")  # rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags
_CPUID_HEADER = struct.Struct("<II")  # number of entries, padding
_CPUID_ENTRY_SIZE = 40
_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES
_SIGNAL_MASK = struct.Struct("<IQ")  # length of the set, the set

_GET_API_VERSION = _ioc(0, 0x00, 0)
_CREATE_VM = _ioc(0, 0x01, 0)
_GET_VCPU_MMAP_SIZE = _ioc(0, 0x04, 0)
_GET_SUPPORTED_CPUID = _ioc(3, 0x05, _CPUID_HEADER.size)
_CREATE_VCPU = _ioc(0, 0x41, 0)
_SET_USER_MEMORY_REGION = _ioc(1, 0x46, _MEMORY_REGION.size)
_RUN = _ioc(0, 0x80, 0)
_SET_REGS = _ioc(1, 0x82, _REGS.size)
_GET_SREGS = _ioc(2, 0x83, _SREGS_SIZE)
_SET_SREGS = _ioc(1, 0x84, _SREGS_SIZE)
_SET_SIGNAL_MASK = _ioc(1, 0x8B, 4)
_SET_CPUID2 = _ioc(1, 0x90, _CPUID_HEADER.size)
_GET_TSC_KHZ = _ioc(0, 0xA3, 0)

_EXIT_IO = 2
_EXIT_HLT = 5
_RUN_EXIT_REASON = 8  # offsets into struct kvm_run
_RUN_IO = 32
_IO_EXIT = struct.Struct("<BBHIQ")  # direction, size, port, count, offset of the data in kvm_run

# The guest's memory: 4 MiB, mapped one to one by two large pages.
_MEMORY_SIZE = 4 << 20
_PML4, _PDPT, _PAGE_DIRECTORY, _CODE, _STACK = 0x1000, 0x2000, 0x3000, 0x8000, 0x20000
_SCRATCH, _COUNT, _XSAVE_AREA = 0x300000, 0x300100, 0x301000
_PRESENT_WRITABLE, _LARGE_PAGE = 0x3, 0x80
_CR0_LONG_MODE = 0x80000031  # PG | NE | ET | PE
_CR4_LONG_MODE = 0x620  # PAE | OSFXSR | OSXMMEXCPT
_EFER_LONG_MODE = 0x500  # LME | LMA
_RFLAGS_RESERVED = 0x2

_REPORT = b"\xe7\x10"  # out %eax,$0x10: leaves to this process with a value

_LOOP = (
    _REPORT  #                                                 1: ready, or the loop is done
    + b"\x8b\x0c\x25" + _COUNT.to_bytes(4, "little")  #           mov COUNT,%ecx    written by this process
    + b"\xe3\x06"  #                                              jrcxz 2f          0: go on with the steps
    + COUNT_DOWN
    + b"\xeb\xef"  #                                              jmp 1b; 2:
)  # fmt: skip


class _Step(NamedTuple):
    """Instructions, the CPU flag without which they are left out, and the value they must report."""

    name: str
    flag: str
    code: bytes
    expected: int


_STEPS = (
    _Step(
        "lock cmpxchg16b",
        "cx16",
        b"\xbf" + _SCRATCH.to_bytes(4, "little")  # mov $SCRATCH,%edi     16 bytes of zero
        + b"\x31\xc0\x31\xd2"  #                    xor %eax,%eax; xor %edx,%edx
        + b"\xbb\x5a\x00\x00\x00"  #                mov $0x5a,%ebx
        + b"\xb9\xa5\x00\x00\x00"  #                mov $0xa5,%ecx
        + b"\xf0\x48\x0f\xc7\x0f"  #                lock cmpxchg16b (%rdi)
        + b"\x8b\x07\x03\x47\x08",  #               mov (%rdi),%eax; add 8(%rdi),%eax
        0x5A + 0xA5,
    ),
    _Step(
        "popcnt",
        "popcnt",
        b"\xb8\xf0\xf0\x00\x00"  #                  mov $0xf0f0,%eax
        + b"\xf3\x48\x0f\xb8\xc0",  #               popcnt %rax,%rax
        8,
    ),
    _Step(
        "xsave",
        "xsave",
        b"\x0f\x20\xe0"  #                          mov %cr4,%rax
        + b"\x0d\x00\x00\x04\x00"  #                or $OSXSAVE,%eax
        + b"\x0f\x22\xe0"  #                        mov %rax,%cr4
        + b"\x31\xc9\x31\xd2"  #                    xor %ecx,%ecx; xor %edx,%edx
        + b"\xb8\x03\x00\x00\x00"  #                mov $3,%eax           x87 and SSE
        + b"\x0f\x01\xd1"  #                        xsetbv
        + b"\xbf" + _XSAVE_AREA.to_bytes(4, "little")
        + b"\x48\x0f\xae\x27"  #                    xsave64 (%rdi)
        + b"\x48\x0f\xae\x2f",  #                   xrstor64 (%rdi)
        3,
    ),
)  # fmt: skip
_HLT = b"\xf4"

_FIRST_COUNTS = 1_000  # 1 ms where instructions are interpreted (2 to 4 M/s), 1 us on hardware
_LAST_COUNTS = 3_000_000  # 1 ms on hardware: the 1-50 us of an exit (the most when nested) no longer matter
_QUICK_NS = 500_000
_TRIES_MIN = 3  # a neighbour may have had the CPU
_BUDGET_NS = 6_000_000
_RATIO_MIN = 0.02  # hardware: 0.5 to 1; interpreted: 0.001 and less. Between them on a scale of factors
_RATE_MIN = 100  # where this process may not measure itself
_DEADLINE_S = 2.0


class _Refused(Exception):
    """The answer is no; the text says why."""


def probe_kvm(device: Path = DEVICE) -> KvmProbe:
    """Run a tiny guest on ``device`` and say whether KVM is worth using, and why not.

    Blocks for 2-30 ms (2 s at the very most); never raises; leaves no descriptor and no thread behind.
    """
    started = time.perf_counter()
    present, guest_rate, host_rate = device.exists(), None, None
    usable, reason = False, ""
    try:
        if platform.machine() != "x86_64":
            raise _Refused(f"the probe knows x86_64 only, this host is {platform.machine()}")
        with _open_guest(device, _cpu_flags()) as guest:
            host_rate = measure_loop_rate()
            guest_rate = guest.measure_loop_rate()
            _judge_rate(guest_rate, host_rate)
            guest.run_steps()
        usable, reason = True, f"runs a guest: its kernel mode does {_compare(guest_rate, host_rate)}"
    except _Refused as refused:
        reason = str(refused)
    except (OSError, ValueError, struct.error) as error:
        reason = f"{device}: {getattr(error, 'strerror', None) or error}"
    return KvmProbe(
        present=present,
        usable=usable,
        reason=reason,
        million_instructions_per_s=guest_rate,
        host_million_instructions_per_s=host_rate,
        duration_ms=round((time.perf_counter() - started) * 1000, 1),
    )


def read_tsc_khz(device: Path = DEVICE) -> int | None:
    """Return the rate of the host's time-stamp counter as KVM knows it, or None where it does not."""
    try:
        with ExitStack() as stack:
            _, vm = _create_vm(device, stack)
            vcpu = _owned(fcntl.ioctl(vm, _CREATE_VCPU, 0), stack)
            return fcntl.ioctl(vcpu, _GET_TSC_KHZ, 0) or None
    except (_Refused, OSError):
        return None


def _judge_rate(guest_rate: int, host_rate: int | None) -> None:
    floor = _RATE_MIN if host_rate is None else host_rate * _RATIO_MIN
    if guest_rate < floor:
        raise _Refused(f"the guest's kernel mode does {_compare(guest_rate, host_rate)}: emulated, not run by the CPU")


def _compare(guest_rate: int, host_rate: int | None) -> str:
    beside = "" if host_rate is None else f", the host itself {host_rate}"
    return f"{guest_rate} M instructions/s{beside}"


class _Guest:
    """The vCPU while it runs the code above. Made by `_open_guest`; the kernel's errors pass through as OSError."""

    def __init__(self, vcpu: int, run: mmap.mmap, memory: mmap.mmap, steps: tuple[_Step, ...], deadline: float) -> None:
        self._vcpu, self._run, self._memory, self._steps, self._deadline = vcpu, run, memory, steps, deadline

    def measure_loop_rate(self) -> int:
        """Return million instructions per second, the best of at least three loops.

        They grow while the time allows, so that what an exit costs is seen to be small beside them. At least 1.
        """
        self._expect_report("start")
        counts, tries, spent, best = _FIRST_COUNTS, 0, 0, 1
        while tries < _TRIES_MIN or (spent < _BUDGET_NS and counts < _LAST_COUNTS):
            ns = self._time_loop(counts)
            best = max(best, round(counts * INSTRUCTIONS_PER_COUNT * 1000 / max(ns, 1)))
            tries, spent = tries + 1, spent + ns
            counts = min(counts * (10 if ns < _QUICK_NS else 2), _LAST_COUNTS)
        return best

    def run_steps(self) -> None:
        """Raise _Refused naming the first instruction that is not carried out, or wrongly."""
        self._set_count(0)
        for step in self._steps:
            value = self._expect_report(step.name)
            if value != step.expected:
                raise _Refused(f"the guest's instruction {step.name} gives {value:#x} instead of {step.expected:#x}")
        if (reason := self._enter()) != _EXIT_HLT:
            raise _Refused(f"the guest's instruction hlt ends in KVM exit {reason}")

    def _time_loop(self, counts: int) -> int:
        """Return nanoseconds: the thread's CPU time, so that a loaded host is not called slow; else the wall's.

        Where a kernel distrusts its TSC the CPU time advances in ticks of 4 ms, or not at all: the smaller one above 0.
        """
        self._set_count(counts)
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        self._expect_report("loop")
        cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
        return min(wall, cpu or wall)

    def _set_count(self, counts: int) -> None:
        self._memory[_COUNT : _COUNT + 4] = counts.to_bytes(4, "little")

    def _expect_report(self, name: str) -> int:
        reason = self._enter()
        if reason != _EXIT_IO:
            raise _Refused(f"the guest's instruction {name} is not carried out (KVM exit {reason})")
        *_, offset = _IO_EXIT.unpack_from(self._run, _RUN_IO)
        return int.from_bytes(self._run[offset : offset + 4], "little")

    def _enter(self) -> int:
        while time.monotonic() < self._deadline:
            try:
                fcntl.ioctl(self._vcpu, _RUN, 0)
            except InterruptedError:  # any signal does that; only the deadline ends it
                continue
            return int.from_bytes(self._run[_RUN_EXIT_REASON : _RUN_EXIT_REASON + 4], "little")
        raise _Refused(f"the guest did not come back within {_DEADLINE_S:g} s")


@contextmanager
def _open_guest(device: Path, flags: frozenset[str]) -> Iterator[_Guest]:
    steps = tuple(step for step in _STEPS if step.flag in flags)
    with ExitStack() as stack:
        memory = stack.enter_context(mmap.mmap(-1, _MEMORY_SIZE))
        _write_memory(memory, _LOOP + b"".join(step.code + _REPORT for step in steps) + _HLT)
        kvm, vm = _create_vm(device, stack)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, _MEMORY_REGION.pack(0, 0, 0, _MEMORY_SIZE, address))
        vcpu = _owned(fcntl.ioctl(vm, _CREATE_VCPU, 0), stack)
        run = stack.enter_context(mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0)))
        _set_up_vcpu(kvm, vcpu)
        stack.enter_context(_interrupted_at_deadline(vcpu))
        yield _Guest(vcpu, run, memory, steps, time.monotonic() + _DEADLINE_S)


def _create_vm(device: Path, stack: ExitStack) -> tuple[int, int]:
    kvm = _owned(os.open(device, os.O_RDWR | os.O_CLOEXEC), stack)
    if (version := fcntl.ioctl(kvm, _GET_API_VERSION, 0)) != _API_VERSION:
        raise _Refused(f"{device} speaks KVM API version {version}, not {_API_VERSION}")
    return kvm, _owned(fcntl.ioctl(kvm, _CREATE_VM, 0), stack)


def _owned(descriptor: int, stack: ExitStack) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _write_memory(memory: mmap.mmap, code: bytes) -> None:
    """Write the page tables (Intel SDM vol. 3, 4.5: 2 MiB pages) and the code."""
    _U64.pack_into(memory, _PML4, _PDPT | _PRESENT_WRITABLE)
    _U64.pack_into(memory, _PDPT, _PAGE_DIRECTORY | _PRESENT_WRITABLE)
    for page in range(2):
        _U64.pack_into(memory, _PAGE_DIRECTORY + 8 * page, page << 21 | _LARGE_PAGE | _PRESENT_WRITABLE)
    memory[_CODE : _CODE + len(code)] = code


def _set_up_vcpu(kvm: int, vcpu: int) -> None:
    """Put the vCPU into 64-bit mode, ring 0, at the code, with every CPU feature KVM offers."""
    cpuid = bytearray(_CPUID_HEADER.size + _CPUID_ENTRIES * _CPUID_ENTRY_SIZE)
    _CPUID_HEADER.pack_into(cpuid, 0, _CPUID_ENTRIES, 0)
    fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, cpuid, True)
    fcntl.ioctl(vcpu, _SET_CPUID2, cpuid, True)
    sregs = bytearray(_SREGS_SIZE)
    fcntl.ioctl(vcpu, _GET_SREGS, sregs, True)
    code = _SEGMENT.pack(0, 0xFFFFFFFF, 0x08, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    data = _SEGMENT.pack(0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[: 6 * _SEGMENT.size] = code + 5 * data
    cr0, cr2, _, cr4, cr8, efer, apic_base = _CONTROL.unpack_from(sregs, _SREGS_CONTROL)
    _CONTROL.pack_into(
        sregs, _SREGS_CONTROL,
        cr0 | _CR0_LONG_MODE, cr2, _PML4, cr4 | _CR4_LONG_MODE, cr8, efer | _EFER_LONG_MODE, apic_base,
    )  # fmt: skip
    fcntl.ioctl(vcpu, _SET_SREGS, sregs, True)
    fcntl.ioctl(vcpu, _SET_REGS, _REGS.pack(*[0] * 6, _STACK, *[0] * 9, _CODE, _RFLAGS_RESERVED))


@contextmanager
def _interrupted_at_deadline(vcpu: int) -> Iterator[None]:
    """Make KVM_RUN return EINTR at the deadline, should a broken KVM never come back by itself.

    The signal is blocked in this thread and let through only inside KVM_RUN (KVM_SET_SIGNAL_MASK), so nobody's
    handler ever sees it and the probe may run in any thread.
    """
    kick = signal.SIGRTMAX
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {kick})
    blocked_inside = sum(1 << (number - 1) for number in before if number != kick)
    thread = threading.get_ident()
    timer = threading.Timer(_DEADLINE_S, signal.pthread_kill, (thread, kick))
    timer.daemon = True
    try:
        fcntl.ioctl(vcpu, _SET_SIGNAL_MASK, _SIGNAL_MASK.pack(8, blocked_inside))
        timer.start()
        yield
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        signal.sigtimedwait({kick}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cpu_flags() -> frozenset[str]:
    with Path("/proc/cpuinfo").open() as cpuinfo:
        for line in cpuinfo:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
