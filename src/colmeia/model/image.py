"""Images: read-only things VMs start from."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from colmeia.model.base import Id, Model, Name, Size


class ImageState(StrEnum):
    IMPORTING = "importing"  # left for READY, or with the row when it fails: the operation keeps the reason
    READY = "ready"  # the bytes are in place, checked and read-only
    DELETING = "deleting"  # entered with the delete operation; left when the last byte is gone


class ImageFormat(StrEnum):
    """Source formats that are taken; every image is stored as qcow2."""

    QCOW2 = "qcow2"
    RAW = "raw"
    VMDK = "vmdk"
    VHDX = "vhdx"
    VDI = "vdi"
    VPC = "vpc"


class DirectBoot(Model):
    """What a direct-kernel image brings beside its disk."""

    arguments: str = Field(default="", max_length=2000, description="Kernel command line.")


class Image(Model):
    """An image as the API shows it."""

    id: Id
    project: str
    name: Name
    revision: int = 1
    state: ImageState
    source: str = Field(description="Where it came from: a file, a URL or 'build:tiny'.")
    os: str = Field(default="", examples=["tiny", "debian/12"])
    virtual_size: Size = 0
    stored_size: Size = 0
    sha256: str = Field(default="", description="Of the source bytes.")
    direct_boot: DirectBoot | None = Field(default=None, description="Set when it boots without firmware and loader.")
    created_at: datetime


class ImageImport(Model):
    """Ask for an image from a file on the server or from a URL."""

    name: Name
    source: str = Field(min_length=1, max_length=2000, description="Absolute path on the server, or http(s) URL.")
    format: ImageFormat | None = Field(default=None, description="Found by probing when absent; a raw source needs it.")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    os: str = Field(default="", max_length=60)


class ImageBuild(Model):
    """Ask for an image made from the distribution's packages."""

    name: Name
    recipe: str = Field(pattern=r"^[a-z0-9]+(/[a-z0-9.]+)?$", examples=["tiny", "debian/12"])
