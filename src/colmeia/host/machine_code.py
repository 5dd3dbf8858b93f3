"""Runs a handful of known x86-64 instructions in this very process: the yardstick the KVM probe measures with.

Python cannot read the time-stamp counter nor run a loop at the CPU's own speed; twelve bytes of machine code in an
executable page can. Refuses to run anything but the constants below, and answers None where the system forbids
executable memory (SELinux without execmem) or the CPU is another one.
"""

import ctypes
import mmap
import platform
import time
from collections.abc import Callable

COUNT_DOWN = b"\xff\xc9\x75\xfc"  # 1: dec %ecx; jnz 1b
INSTRUCTIONS_PER_COUNT = 2

_LOOP = (
    b"\x89\xf9"  # mov %edi,%ecx     the first argument, by the System V calling convention
    + COUNT_DOWN
    + b"\xc3"  #   ret
)
_READ_TSC = (
    b"\x0f\x31"  #         rdtsc             to %edx:%eax
    b"\x48\xc1\xe2\x20"  # shl $32,%rdx
    b"\x48\x09\xd0"  #     or %rdx,%rax
    b"\xc3"  #             ret
)
_COUNTS = 200_000  # 60 us of a CPU of 3 GHz: long beside the 1 us of a ctypes call
_TRIES = 3
_TSC_WINDOW_NS = 20_000_000  # the call's own microsecond is then 0.005 %


def measure_loop_rate() -> int | None:
    """Return the million instructions per second of a countdown loop in user space (best of 3), or None."""
    page = _executable_page(_LOOP)
    if page is None:
        return None
    try:
        loop = ctypes.CFUNCTYPE(None, ctypes.c_uint32)(_address(page))
        best = min(_elapsed_ns(loop) for _ in range(_TRIES))
    finally:
        page.close()
    return round(_COUNTS * INSTRUCTIONS_PER_COUNT * 1000 / max(best, 1))


def measure_tsc_khz() -> int | None:
    """Return the rate of the time-stamp counter against CLOCK_MONOTONIC_RAW, within 0.01 %; None where impossible.

    Takes 20 ms.
    """
    page = _executable_page(_READ_TSC)
    if page is None:
        return None
    try:
        read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(_address(page))
        started_ns, started = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), read_tsc()
        while (now_ns := time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)) - started_ns < _TSC_WINDOW_NS:
            pass
        ticks = read_tsc() - started
    finally:
        page.close()
    return round(ticks * 1_000_000 / (now_ns - started_ns)) if ticks > 0 else None


def _elapsed_ns(loop: Callable[[int], None]) -> int:
    # Not the thread's CPU time: where the kernel distrusts its TSC that may stand still, and the rate become infinite.
    started = time.perf_counter_ns()
    loop(_COUNTS)
    return time.perf_counter_ns() - started


def _executable_page(code: bytes) -> mmap.mmap | None:
    if platform.machine() != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page[: len(code)] = code
    return page


def _address(page: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(page))
