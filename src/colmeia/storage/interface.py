"""What the house asks of storage: where images come from and where volumes live.

Storage knows bytes on disks. It knows no database, no user, no VM and no QEMU process: it is handed ids and values and
answers with `BlockSource` and `BootFiles` values that the engine opens. Every call *ensures* a state, so an operation
that was cut short may be run again from its start.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from colmeia.model.block import BlockSource, BootFiles
from colmeia.model.image import ImageFormat

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and a sentence about what is being done. Must not block."""


class StoredImage(NamedTuple):
    """What is known of an image once its bytes are in place. ``sha256`` is that of the source bytes; '' if built."""

    virtual_size: int
    stored_size: int
    sha256: str
    source_format: str
    boot: BootFiles | None
    os: str = ""


class BuiltImage(NamedTuple):
    """The files a recipe made. ``disk`` is a qcow2 without a backing file, when there is one."""

    kernel: Path | None
    initrd: Path | None
    arguments: str
    disk: Path | None
    os: str = ""


class VolumePool(Protocol):
    """Where the disks of VMs live. Volume ids are `VMID-DISKNAME`, so a retry finds what it made."""

    def block_source(self, volume_id: str, *, backing: BlockSource | None = None) -> BlockSource:
        """Return how a volume that exists is opened; makes nothing."""

    async def ensure_volume(self, volume_id: str, *, size_bytes: int, backing: BlockSource | None) -> BlockSource:
        """Ensure the volume exists with this size, empty or a copy-on-write child of ``backing``.

        Raises Invalid `disk_smaller_than_image` and Unavailable `disk_full`; leaves nothing half-made.
        """

    async def delete_volume(self, volume_id: str) -> None:
        """Ensure the volume is gone."""


class Images(Protocol):
    """Where images live, read-only once they are ready."""

    def check_recipe(self, recipe: str) -> None:
        """Raise Invalid (`unknown_recipe`) for a recipe that is not known."""

    async def import_image(
        self,
        image_id: str,
        source: str,
        *,
        format: ImageFormat | None,  # noqa: A002
        sha256: str | None,
        progress: Progress,
    ) -> StoredImage: ...

    async def build(self, image_id: str, recipe: str, *, progress: Progress) -> StoredImage: ...

    async def delete(self, image_id: str) -> None: ...

    def export(self, image_id: str, format: ImageFormat) -> AsyncIterator[bytes]: ...  # noqa: A002

    def block_source(self, image_id: str) -> BlockSource: ...

    def boot_files(self, image_id: str) -> BootFiles | None: ...
