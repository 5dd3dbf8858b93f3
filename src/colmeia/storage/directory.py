"""Volumes as qcow2 files in one folder: the pool that needs nothing but a file system.

A volume appears by rename, so a file that is there is whole and a file named `.new` is left-over of a crash. Refuses
to touch anything that is not named by a volume id.
"""

import os
import re
from pathlib import Path

import anyio.to_thread

from colmeia.host.process import last_lines, run
from colmeia.model.base import format_size
from colmeia.model.block import BlockFormat, BlockSource
from colmeia.model.errors import Internal, Invalid, Unavailable
from colmeia.storage.inspect import qcow2_virtual_size
from colmeia.storage.space import is_disk_full, no_space

_VOLUME_ID = re.compile(r"[0-9a-z][0-9a-z.-]{0,127}")


class DirectoryPool:
    """A `VolumePool` on a folder. Any number of calls for different volumes may run at once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def block_source(self, volume_id: str, *, backing: BlockSource | None = None) -> BlockSource:
        """Return how a volume is opened; does not look whether it is there."""
        return BlockSource(path=str(self._path(volume_id)), format=BlockFormat.QCOW2, backing=backing)

    async def ensure_volume(self, volume_id: str, *, size_bytes: int, backing: BlockSource | None) -> BlockSource:
        """Ensure the volume exists: empty, or a copy-on-write child of ``backing`` (a qcow2 image).

        A volume that is there stays as it is, whatever its size. Idempotent and cancel-safe: nothing half-made stays.
        Raises Invalid `disk_smaller_than_image`, Unavailable `disk_full`.
        """
        path = self._path(volume_id)
        found = self.block_source(volume_id, backing=backing)
        if await anyio.to_thread.run_sync(path.exists):
            return found
        size = (size_bytes + 511) // 512 * 512
        argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if backing is not None:
            await anyio.to_thread.run_sync(_refuse_smaller, Path(backing.path), size)
            argv += ["-u", "-b", backing.path, "-F", backing.format.value]
        new = path.with_name(f"{path.name}.new")
        try:
            await anyio.to_thread.run_sync(_prepare, self._root, new)
            completed = await run([*argv, str(new), str(size)], timeout_s=60, check=False)
            if completed.returncode != 0 and is_disk_full(completed.stderr):
                raise no_space(f"create the volume {volume_id}", self._root)
            if completed.returncode != 0:
                raise Unavailable(
                    "volume_failed",
                    f"The volume {volume_id} could not be created: {last_lines(completed.stderr)}",
                    "Look at the file system of the pool.",
                )
            await anyio.to_thread.run_sync(_publish, new, path)
        except OSError as error:
            if is_disk_full(error):
                raise no_space(f"create the volume {volume_id}", self._root) from error
            raise
        finally:
            new.unlink(missing_ok=True)
        return found

    async def delete_volume(self, volume_id: str) -> None:
        """Ensure the volume is gone. Idempotent."""
        path = self._path(volume_id)
        await anyio.to_thread.run_sync(_unlink, path.with_name(f"{path.name}.new"), path)

    def _path(self, volume_id: str) -> Path:
        if not _VOLUME_ID.fullmatch(volume_id):
            raise Internal("volume_id", f"{volume_id!r} is not a volume id.")
        return self._root / f"{volume_id}.qcow2"


def _prepare(root: Path, new: Path) -> None:
    """Make an empty file that only we may read, before qemu-img fills it."""
    root.mkdir(mode=0o711, parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _publish(new: Path, path: Path) -> None:
    fd = os.open(new, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(path)


def _refuse_smaller(image: Path, size: int) -> None:
    needed = qcow2_virtual_size(image)
    if size < needed:
        raise Invalid(
            "disk_smaller_than_image",
            f"A disk of {format_size(size)} cannot start from an image of {format_size(needed)}.",
            f"Ask for at least {format_size(needed)}.",
        )
