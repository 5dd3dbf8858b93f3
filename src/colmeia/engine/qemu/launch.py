"""Carrying out a plan: open what QEMU is handed, hold the VM's lock, spawn.

Everything here blocks for a moment and runs in one worker thread per start. It refuses to start a second QEMU for a VM
(`AlreadyRunsError`): the lock is inherited by QEMU, so it is free exactly when no QEMU of this VM lives.
"""

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
from pathlib import Path

from colmeia.engine.qemu.command import QEMU_HINT, Access, OpenFile, Plan, render
from colmeia.engine.qemu.process import Process, write_pid
from colmeia.model.errors import ColmeiaError, Conflict, Unavailable, Unsupported
from colmeia.model.vm import Forward

_FLAGS = {
    Access.READ: os.O_RDONLY,
    Access.WRITE: os.O_RDWR,
    Access.APPEND: os.O_WRONLY | os.O_APPEND | os.O_CREAT,
}
_BACKLOG = 4
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


class AlreadyRunsError(Exception):
    """The VM's lock is held: its QEMU lives."""


def launch(plan: Plan, run: Path, logs: Path) -> Process:
    """Start QEMU and return its process. ``run`` and ``logs`` are the VM's own folders, made when missing.

    Blocks; not idempotent. Raises AlreadyRunsError, Conflict (`port_in_use`), Unavailable (a file is missing, QEMU
    cannot be executed). Leaves no process and no descriptor behind when it raises.
    """
    for folder in (run, logs):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for forward in plan.forwards:
        _check_port(forward, unprivileged=plan.drops_privileges)
    with contextlib.ExitStack() as stack:
        lock = _lock(run / "lock", stack)
        fds = {file.key: _open(file, stack) for file in plan.files}
        for name in plan.listeners:
            fds[name] = _listen(run / f"{name}.sock", stack)
        log = _fresh_log(logs / "qemu.log", stack)
        (run / "pid").unlink(missing_ok=True)
        pid = _spawn(render(plan.argv, fds), (lock, *fds.values()), log)
        write_pid(run, pid)
        return Process(pid, os.pidfd_open(pid))


def _spawn(argv: list[str], fds: tuple[int, ...], log: int) -> int:
    """Execute without fork handlers and without user switching, so that Python can use vfork: 1 ms instead of 10."""
    try:
        child = subprocess.Popen(
            argv, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_ENVIRONMENT,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Unavailable("qemu_missing", f"Cannot execute {argv[0]}: {error.strerror}.", QEMU_HINT) from error
    child.returncode = 0  # the engine reaps it by its pidfd; this object must neither wait for it nor complain
    return child.pid


def _lock(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AlreadyRunsError from error
    return fd


def _open(file: OpenFile, stack: contextlib.ExitStack) -> int:
    try:
        fd = os.open(file.path, _FLAGS[file.access] | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _file_error(file.path, error) from error
    stack.callback(os.close, fd)
    return fd


def _file_error(path: str, error: OSError) -> ColmeiaError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("disk_full", f"Cannot write {path}: the host's disk is full.", "Free some space.")
    hint = "It was moved or deleted behind Colmeia's back: put it back." if error.errno == errno.ENOENT else ""
    return Unavailable("file_unusable", f"Cannot open {path}: {error.strerror}.", hint)


def _listen(path: Path, stack: contextlib.ExitStack) -> int:
    """Return a listening socket, bound inside its folder: the whole path may be longer than a socket's 107 bytes."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(listener.close)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
    listener.listen(_BACKLOG)
    return listener.fileno()


def _fresh_log(path: Path, stack: contextlib.ExitStack) -> int:
    """Open an empty log for this run; the one before it stays as ``qemu.log.1``."""
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_name(path.name + ".1"))
    return _open(OpenFile("qemu-log", str(path), Access.APPEND, None), stack)


def _check_port(forward: Forward, *, unprivileged: bool) -> None:
    """Try the port as QEMU will (SO_REUSEADDR), so that a port in use is told before anything exists."""
    where = f"{forward.protocol} port {forward.host_port} on {forward.host_address}"
    if unprivileged and forward.host_port < _first_unprivileged_port():
        raise Unsupported(
            "port_privileged", f"Cannot forward {where}: QEMU runs unprivileged.", "Choose a port from 1024 upwards."
        )
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if forward.protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((forward.host_address, forward.host_port))
        except OSError as error:
            raise _port_error(where, error) from error


def _port_error(where: str, error: OSError) -> ColmeiaError:
    if error.errno == errno.EADDRINUSE:
        hint = "Another program or VM has it: choose another port, or stop that one (ss -ltnup names it)."
        return Conflict("port_in_use", f"Cannot forward {where}: it is in use.", hint)
    return Unsupported("port_unusable", f"Cannot forward {where}: {error.strerror}.", "Choose an address of this host.")


def _first_unprivileged_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024
