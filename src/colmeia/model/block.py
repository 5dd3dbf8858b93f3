"""What storage hands to the engine: where the bytes of a disk live."""

from enum import StrEnum

from colmeia.model.base import Model


class BlockFormat(StrEnum):
    QCOW2 = "qcow2"
    RAW = "raw"


class BlockSource(Model):
    """A disk as the engine opens it: a file, and what it is a copy-on-write child of (never read from its header)."""

    path: str
    format: BlockFormat
    read_only: bool = False
    backing: "BlockSource | None" = None


class BootFiles(Model):
    """Kernel and initial RAM disk of a direct-boot image."""

    kernel: str
    initrd: str
    arguments: str = ""
