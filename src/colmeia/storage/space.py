"""Knows a full disk when it sees one, and says so in one way everywhere."""

import errno
import os
from pathlib import Path

from colmeia.model.base import GIB, MIB
from colmeia.model.errors import Unavailable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(reason: OSError | bytes) -> bool:
    """Say whether an error, or what a program wrote to stderr, means that there is no space left."""
    if isinstance(reason, OSError):
        return reason.errno in _FULL
    return any(os.strerror(number).encode() in reason for number in _FULL)


def free_bytes(folder: Path) -> int:
    """Return what may still be written there (statvfs; as root, the reserve counts too)."""
    found = os.statvfs(folder)
    return found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)


def reserve_bytes(folder: Path) -> int:
    """Return what must stay free so that the rest of the host goes on: 2 % of the file system, at most 1 GiB."""
    found = os.statvfs(folder)
    return min(found.f_frsize * found.f_blocks // 50, GIB)


def no_space(attempt: str, folder: Path, needed: int | None = None) -> Unavailable:
    """Return the error for a full disk, with figures."""
    wanted = f"; {needed / MIB:.0f} MiB are needed" if needed is not None else ""
    return Unavailable(
        "disk_full",
        f"Cannot {attempt}: {folder} has {free_bytes(folder) / MIB:.0f} MiB free{wanted}.",
        "Free some space there, then try again.",
    )
