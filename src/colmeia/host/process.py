"""Runs a program of the host to its end: the one place that starts short-lived children.

A child never outlives the call that started it: cancelled, timed out or failed, its whole process group is killed and
it is reaped before `run` returns, and the kernel kills it should the daemon die (PR_SET_PDEATHSIG). Refuses shells,
and refuses to start what must outlive the daemon (QEMU): that is the engine's work.
"""

import contextlib
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import NamedTuple

import anyio
from anyio.abc import ByteReceiveStream, Process

from colmeia.model.errors import Unavailable

_PACKAGES = {
    "apt-get": "apt",
    "busybox": "busybox-static",
    "dpkg-deb": "dpkg",
    "grub-mkimage": "grub-common grub-efi-amd64-bin grub-pc-bin",
    "mcopy": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "sgdisk": "gdisk",
}
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_OUTPUT_LIMIT = 64 << 20
_LAST_LINES = 8


class Completed(NamedTuple):
    """How a program ended. ``returncode`` is minus the signal's number when a signal ended it."""

    returncode: int
    stdout: bytes
    stderr: bytes


def find_program(name: str) -> str:
    """Return the path of a program, looking into the sbin folders too; raise Unavailable naming its package."""
    search = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    found = shutil.which(name, path=search)
    if found is None:
        package = _PACKAGES.get(Path(name).name, Path(name).name)
        raise Unavailable(
            "program_missing", f"The program {name} is not installed on this host.", f"Run: apt-get install {package}"
        )
    return found


def last_lines(output: bytes, count: int = _LAST_LINES) -> str:
    """Return the last lines a program wrote, for an error message."""
    lines = [line.strip() for line in output.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return "; ".join(line[:300] for line in lines[-count:])


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    input: bytes | None = None,  # noqa: A002
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    check: bool = True,
    on_output: Callable[[bytes], None] | None = None,
) -> Completed:
    """Run ``argv`` to its end and return its exit code and output.

    ``env`` is added to the daemon's environment, with the C locale so that messages can be read. ``on_output`` is
    called with each piece of stdout and stderr as it comes (progress). Of very long output the end is kept (64 MiB).
    Raises Unavailable: `program_missing`, `program_timeout`, and with ``check`` also `program_failed`.
    Cancel-safe: leaving it, by whatever way, means that the child's process group is dead and the child is reaped.
    """
    program = find_program(argv[0])
    command = [find_program("setpriv"), "--pdeathsig", "KILL", "--", program, *argv[1:]]
    environment = {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}", **(env or {})}
    stdin = PIPE if input is not None else DEVNULL
    stdout, stderr = bytearray(), bytearray()
    with anyio.move_on_after(timeout_s if math.isfinite(timeout_s) else None) as deadline:
        process = await _open(command, stdin=stdin, environment=environment, cwd=cwd)
        try:
            async with anyio.create_task_group() as tasks:
                if process.stdout is not None:
                    tasks.start_soon(_collect, process.stdout, stdout, on_output, name=f"stdout of {argv[0]}")
                if process.stderr is not None:
                    tasks.start_soon(_collect, process.stderr, stderr, on_output, name=f"stderr of {argv[0]}")
                if input is not None:
                    tasks.start_soon(_feed, process, input, name=f"stdin of {argv[0]}")
                await process.wait()
                _kill_group(process)  # what it left behind would hold the pipes open
        finally:
            await _end(process)
    if deadline.cancelled_caught:
        raise Unavailable(
            "program_timeout",
            f"{Path(program).name} did not end within {timeout_s:g} s and was killed. It last said: "
            f"{last_lines(bytes(stderr)) or 'nothing'}.",
            "Look at the load of this host, then try again.",
        )
    completed = Completed(process.returncode or 0, bytes(stdout), bytes(stderr))
    if check and completed.returncode != 0:
        raise failure(argv, completed)
    return completed


def failure(argv: Sequence[str], completed: Completed) -> Unavailable:
    """Return the error for a program that ended badly, with its last words."""
    code = completed.returncode
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    words = last_lines(completed.stderr) or last_lines(completed.stdout) or "nothing"
    return Unavailable("program_failed", f"{Path(argv[0]).name} {ended}. It said: {words}.")


async def _open(
    command: list[str], *, stdin: int, environment: dict[str, str], cwd: str | os.PathLike[str] | None
) -> Process:
    """Start the child in a session of its own. Shielded: a cancel in the middle must not lose a started child."""
    with anyio.CancelScope(shield=True):
        process = await anyio.open_process(
            command, stdin=stdin, stdout=PIPE, stderr=PIPE, env=environment, cwd=cwd, start_new_session=True
        )
    return process  # noqa: RET504 - mypy takes the scope for one that may swallow errors


async def _collect(stream: ByteReceiveStream, into: bytearray, on_output: Callable[[bytes], None] | None) -> None:
    async for piece in stream:
        into += piece
        if len(into) > _OUTPUT_LIMIT:
            del into[: len(into) - _OUTPUT_LIMIT // 2]
        if on_output is not None:
            on_output(piece)


async def _feed(process: Process, data: bytes) -> None:
    """Write the child's input; a child that ends without reading it is no error of ours."""
    if process.stdin is None:
        return
    try:
        await process.stdin.send(data)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass
    finally:
        with anyio.CancelScope(shield=True):
            await process.stdin.aclose()


def _kill_group(process: Process) -> None:
    """Kill what is left of the child's process group.

    The group outlives its leader when the leader forked. Its id cannot be reused while a member lives; when none
    does, the kernel hands the number out again only after all others.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


async def _end(process: Process) -> None:
    """Kill the child's process group, reap the child and close the pipes."""
    with anyio.CancelScope(shield=True):
        _kill_group(process)
        await process.aclose()
