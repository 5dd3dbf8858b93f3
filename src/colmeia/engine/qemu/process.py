"""A QEMU process as the kernel knows it: found, held by a pidfd, ended, reaped.

A pid alone is never trusted: it is kept with the process's start time, and signals go through a pidfd, so a number that
was given to somebody else is never killed. Refuses to know QMP.
"""

import contextlib
import fcntl
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

from colmeia.engine.qemu.command import vm_uuid

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Process:
    """A live process. ``pidfd`` is ours to close."""

    pid: int
    pidfd: int

    def kill(self) -> None:
        """Send SIGKILL; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def is_alive(self) -> bool:
        """Answer without waiting; a zombie is not alive."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return not poller.poll(0)

    def reap(self) -> int | None:
        """Collect the ended process: its exit code, minus the signal's number, or None when another had started it."""
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def close(self) -> None:
        os.close(self.pidfd)


def start_ticks(pid: int) -> int | None:
    """Return when the process started (field 22 of /proc/PID/stat, proc(5)); None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def write_pid(folder: Path, pid: int) -> None:
    """Note a process, with its start time, so that a later daemon finds it. Replaces the note in one step."""
    ticks = start_ticks(pid)
    if ticks is None:
        return
    temporary = folder / "pid.new"
    temporary.write_text(f"{pid} {ticks}\n")
    temporary.replace(folder / "pid")


def find(folder: Path, vm_id: str) -> Process | None:
    """Return the VM's live process: the noted one, or, when nothing was noted, the one that holds the lock."""
    try:
        words = (folder / "pid").read_text().split()
        noted = _open(int(words[0]), int(words[1]))
    except (OSError, ValueError, IndexError):
        noted = None
    if noted is not None or not is_locked(folder):
        return noted
    return _search(folder, vm_id)


def is_locked(folder: Path) -> bool:
    """Answer whether a process holds the VM's lock. QEMU inherits it, so it is held for as long as QEMU lives."""
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _open(pid: int, ticks: int) -> Process | None:
    if start_ticks(pid) != ticks:
        return None
    try:
        process = Process(pid, os.pidfd_open(pid))
    except ProcessLookupError:
        return None
    if start_ticks(pid) == ticks:  # read again: the pidfd now holds the very process
        return process
    process.close()
    return None


def _search(folder: Path, vm_id: str) -> Process | None:
    """Find a QEMU whose daemon died between starting it and noting its pid: by its UUID, and by the lock it holds."""
    mark = b"-uuid\0" + vm_uuid(vm_id).encode() + b"\0"
    lock = folder / "lock"
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if mark not in Path(f"/proc/{pid}/cmdline").read_bytes():
                continue
            if any(
                descriptor.samefile(lock) for descriptor in Path(f"/proc/{pid}/fd").iterdir() if _is_file(descriptor)
            ):
                ticks = start_ticks(pid)
                return None if ticks is None else _open(pid, ticks)
    return None


def _is_file(descriptor: Path) -> bool:
    return str(descriptor.readlink()).startswith("/")


def log_tail(path: Path) -> tuple[str, ...]:
    """Return the last lines QEMU wrote: at most twenty, from at most the last 64 KiB."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            text = log.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ()
    return tuple(line[:1000] for line in text.splitlines() if line.strip())[-_TAIL_LINES:]


def trim(path: Path, *, limit: int, keep: int) -> None:
    """Cut a log that grew past ``limit`` bytes down to its last ``keep``: a guest must not fill the host's disk.

    QEMU appends, so it goes on at the new end; what it writes during the cut may be lost.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as log:
        size = os.fstat(log.fileno()).st_size
        if size > limit:
            log.seek(size - keep)
            tail = log.read(keep)
            log.truncate(0)
            log.seek(0)
            log.write(tail)
