"""Looks at a disk image that somebody else made, before anything opens it for real.

An image may name other files of the host (a backing file, a data file, extents): whoever opens it then reads them.
So the headers are read here first, by hand, and such images are refused; only then does qemu-img see the file, within
limits on memory and time. A format is never guessed by QEMU: it is found by its magic, and raw only when asked for.
Sources of the layouts: QEMU's docs/interop/qcow2.txt, VMware's Virtual Disk Format 1.1, Microsoft's VHD and VHDX 1.0.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import anyio.to_thread

from colmeia.host.process import Completed, last_lines, run
from colmeia.model.base import GIB, TIB
from colmeia.model.errors import Invalid
from colmeia.model.image import ImageFormat

MAX_VIRTUAL_SIZE = 64 * TIB
_QCOW2_DATA_FILE = 1 << 2  # incompatible feature bit
_QCOW2_DATA_FILE_NAME = 0x44415441  # header extension
_SPARSE_VMDK = ('"monolithicSparse"', '"streamOptimized"')
_CHECKABLE = (ImageFormat.QCOW2, ImageFormat.VMDK, ImageFormat.VDI, ImageFormat.VHDX)


class Inspected(NamedTuple):
    """What an image is. Sizes in bytes; ``cluster_size`` is 0 where the format has none."""

    format: ImageFormat
    virtual_size: int
    file_size: int
    cluster_size: int = 0


def limited(argv: list[str], *, address_space: int = 4 * GIB, cpu_s: int | None = None) -> list[str]:
    """Return ``argv`` run under limits, for programs that read what a stranger wrote."""
    cpu = [f"--cpu={cpu_s}"] if cpu_s else []
    return ["prlimit", f"--as={address_space}", "--core=0", *cpu, *argv]


async def inspect(path: Path, expected: ImageFormat | None = None) -> Inspected:
    """Find out what ``path`` (absolute) is, and refuse what is dangerous or broken.

    Raises Invalid: `image_format`, `image_backing_file`, `image_data_file`, `image_truncated`, `image_too_large`,
    `image_corrupt`. Reads only; safe to repeat.
    """
    found = await anyio.to_thread.run_sync(_read_headers, path, expected)
    facts = await _qemu_info(path, found)
    virtual_size = int(facts["virtual-size"])
    if virtual_size > MAX_VIRTUAL_SIZE:
        raise Invalid(
            "image_too_large",
            f"The image says that its disk has {virtual_size / TIB:.0f} TiB; at most 64 TiB are taken.",
            "Shrink the disk before exporting it, or check the source.",
        )
    file_size = (await anyio.Path(path).stat()).st_size
    if virtual_size == 0:
        raise Invalid("image_truncated", "The image holds a disk of no size at all.", "Check the source.")
    if found in _CHECKABLE:
        await _qemu_check(path, found, file_size)
    return Inspected(found, virtual_size, file_size, int(facts.get("cluster-size", 0)))


def qcow2_virtual_size(path: Path) -> int:
    """Return the size of the disk in a qcow2 of our own (8 bytes at offset 24)."""
    with path.open("rb") as file:
        header = file.read(32)
    if header[:4] != b"QFI\xfb" or len(header) < 32:
        raise Invalid("image_corrupt", f"{path.name} is not a qcow2 file.", "Look at the disk it lies on.")
    return int.from_bytes(header[24:32], "big")


def _read_headers(path: Path, expected: ImageFormat | None) -> ImageFormat:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        found = _by_magic(start, file, size)
        if size == 0:
            raise Invalid("image_truncated", "The image is empty.", "Check the source.")
        if found is None and expected is None:
            raise Invalid(
                "image_format",
                "This is none of the known image formats (qcow2, vmdk, vhdx, vdi, vpc).",
                "If it is a raw disk, say so: --format raw.",
            )
        if found is not None and expected is not None and found is not expected:
            raise Invalid(
                "image_format", f"The image was said to be {expected} but is {found}.", f"Say --format {found}."
            )
        if found is None and expected is not ImageFormat.RAW:
            raise Invalid("image_format", f"The image was said to be {expected} but is not.", "Check the source.")
        kind = found or ImageFormat.RAW
        check = {
            ImageFormat.QCOW2: _check_qcow2,
            ImageFormat.VMDK: _check_vmdk,
            ImageFormat.VDI: _check_vdi,
            ImageFormat.VPC: _check_vpc,
        }.get(kind)
        if check is not None:
            try:
                check(file, size)
            except struct.error:
                raise Invalid(
                    "image_truncated", f"The {kind} image ends inside its header.", "Fetch it again."
                ) from None
    return kind


def _by_magic(start: bytes, file: BinaryIO, size: int) -> ImageFormat | None:
    if start.startswith(b"QFI\xfb"):
        if start[4:8] not in (b"\0\0\0\2", b"\0\0\0\3"):
            raise Invalid(
                "image_format", "This is a qcow image of version 1.", "Convert it: qemu-img convert -O qcow2."
            )
        return ImageFormat.QCOW2
    if start.startswith((b"KDMV", b"COWD")) or start.lstrip().lower().startswith(b"# disk descriptorfile"):
        return ImageFormat.VMDK
    if start.startswith(b"vhdxfile"):
        return ImageFormat.VHDX
    if start[0x40:0x44] == b"\x7f\x10\xda\xbe":
        return ImageFormat.VDI
    if start.startswith(b"conectix") or _vpc_footer(file, size).startswith(b"conectix"):
        return ImageFormat.VPC
    return None


def _refers_to(what: str, code: str, hint: str) -> Invalid:
    return Invalid(code, f"The image refers to another file ({what}): it is not whole by itself.", hint)


def _check_qcow2(file: BinaryIO, size: int) -> None:
    """Refuse backing files, external data files and encryption, by the header and its extensions."""
    file.seek(0)
    header = file.read(104)
    version, backing_offset = struct.unpack_from(">IQ", header, 4)
    (crypt_method,) = struct.unpack_from(">I", header, 32)
    if backing_offset:
        raise _refers_to("a backing file", "image_backing_file", "Flatten it: qemu-img convert -O qcow2 IN OUT.")
    if crypt_method:
        raise Invalid("image_format", "The qcow2 image is encrypted.", "Decrypt it: qemu-img convert -O qcow2.")
    if version < 3:
        return
    (features,) = struct.unpack_from(">Q", header, 72)
    (header_length,) = struct.unpack_from(">I", header, 100)
    if features & _QCOW2_DATA_FILE or _QCOW2_DATA_FILE_NAME in _qcow2_extensions(file, header_length, size):
        raise _refers_to("a data file", "image_data_file", "Convert it: qemu-img convert -O qcow2 IN OUT.")


def _qcow2_extensions(file: BinaryIO, offset: int, size: int) -> set[int]:
    """Return the types of the header extensions; there are never more than a few."""
    found: set[int] = set()
    while offset + 8 <= size and len(found) < 64:
        file.seek(offset)
        kind, length = struct.unpack(">II", file.read(8))
        if kind == 0:
            break
        found.add(kind)
        offset += 8 + (length + 7) // 8 * 8
    return found


def _check_vmdk(file: BinaryIO, size: int) -> None:
    """Take only the two kinds that are one file: monolithicSparse and streamOptimized, without a parent."""
    file.seek(0)
    header = file.read(512)
    hint = "Export it as one file: streamOptimized, as an OVA contains."
    if not header.startswith(b"KDMV"):
        raise _refers_to("its extents", "image_data_file", hint)
    capacity, _, descriptor_sector, descriptor_sectors = struct.unpack_from("<QQQQ", header, 12)
    if capacity == 0 or descriptor_sectors == 0:
        raise _refers_to("its extents", "image_data_file", hint)
    if descriptor_sectors > 2048 or (descriptor_sector + descriptor_sectors) * 512 > size:
        raise Invalid("image_truncated", "The vmdk image ends before its descriptor.", "Fetch it again.")
    file.seek(descriptor_sector * 512)
    text = file.read(descriptor_sectors * 512).split(b"\0", 1)[0].decode(errors="replace")
    if re.search(r"parentFileNameHint", text) or not re.search(r"(?im)^\s*parentCID\s*=\s*f{8}\s*$", text):
        raise _refers_to("a parent disk", "image_backing_file", "Consolidate the VM's snapshots, then export.")
    kinds = re.findall(r"(?m)^\s*createType\s*=\s*(\S+)", text)
    extents = re.findall(r"(?m)^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+(\S+)", text)
    if len(kinds) != 1 or kinds[0] not in _SPARSE_VMDK or extents != ["SPARSE"]:
        raise _refers_to("its extents", "image_data_file", hint)


def _check_vdi(file: BinaryIO, size: int) -> None:
    file.seek(0)
    header = file.read(400)
    (variant,) = struct.unpack_from("<I", header, 0x4C)
    if variant not in (1, 2):  # dynamic, static
        raise _refers_to("a parent disk", "image_backing_file", "Clone the disk in VirtualBox, then export the clone.")
    (data_offset,) = struct.unpack_from("<I", header, 0x158)
    block_size, _, _, allocated = struct.unpack_from("<IIII", header, 0x178)
    _refuse_if_shorter(size, data_offset + block_size * allocated, ImageFormat.VDI)


def _vpc_footer(file: BinaryIO, size: int) -> bytes:
    file.seek(max(0, size - 512))
    return file.read(512)


def _check_vpc(file: BinaryIO, size: int) -> None:
    """A VHD ends with its footer; a dynamic one begins with a copy of it."""
    file.seek(0)
    start = file.read(512)
    footer = _vpc_footer(file, size)
    if not footer.startswith(b"conectix"):
        raise Invalid("image_truncated", "The vpc image has lost its end: its footer is missing.", "Fetch it again.")
    (variant,) = struct.unpack_from(">I", footer, 60)
    if variant == 4 or (start.startswith(b"conectix") and struct.unpack_from(">I", start, 60)[0] == 4):
        raise _refers_to("a parent disk", "image_backing_file", "Merge the differencing disk into its parent.")
    if variant == 2:
        _refuse_if_shorter(size, struct.unpack_from(">Q", footer, 48)[0] + 512, ImageFormat.VPC)


def _refuse_if_shorter(size: int, needed: int, kind: ImageFormat) -> None:
    if size < needed:
        raise Invalid(
            "image_truncated", f"The {kind} image needs {needed} bytes; the file has {size}.", "Fetch it again."
        )


async def _qemu_info(path: Path, kind: ImageFormat) -> dict[str, Any]:
    argv = ["qemu-img", "info", "-U", "--output", "json", "-f", kind.value, str(path)]
    completed = await run(limited(argv, cpu_s=30), timeout_s=60, check=False)
    if completed.returncode != 0:
        raise _broken(kind, completed)
    facts: dict[str, Any] = json.loads(completed.stdout)
    if "backing-filename" in facts or "full-backing-filename" in facts:
        raise _refers_to("a backing file", "image_backing_file", "Flatten it: qemu-img convert -O qcow2 IN OUT.")
    specific = facts.get("format-specific", {}).get("data", {})
    if "data-file" in specific:
        raise _refers_to("a data file", "image_data_file", "Convert it: qemu-img convert -O qcow2 IN OUT.")
    return facts


async def _qemu_check(path: Path, kind: ImageFormat, size: int) -> None:
    """Let qemu-img walk through the tables. Leaks (exit code 3) harm nobody: the image is rewritten anyway.

    A qcow2 that lost its tail reads as zeros there, so its end is compared too. Its last cluster may be a short one
    when clusters are compressed.
    """
    argv = ["qemu-img", "check", "-U", "--output", "json", "-f", kind.value, str(path)]
    completed = await run(limited(argv, cpu_s=600), timeout_s=1800, check=False)
    if completed.returncode == 63:  # this build of qemu-img cannot check the format
        return
    if completed.returncode not in (0, 2, 3):
        raise _broken(kind, completed)
    report: dict[str, Any] = json.loads(completed.stdout)
    slack = 65536 if report.get("compressed-clusters") else 512
    if kind is ImageFormat.QCOW2 and size + slack <= int(report.get("image-end-offset", 0)):
        _refuse_if_shorter(size, int(report["image-end-offset"]), kind)
    if report.get("corruptions") or completed.returncode == 2:
        if b"past the end" in completed.stderr or b"past end" in completed.stderr:
            raise Invalid("image_truncated", f"The {kind} image has lost its end.", "Fetch it again.")
        raise _broken(kind, completed)


def _broken(kind: ImageFormat, completed: Completed) -> Invalid:
    words = last_lines(completed.stderr, 2) or last_lines(completed.stdout, 2)
    if re.search(r"truncated|past end|Could not read|too short|end of file", words, re.IGNORECASE):
        return Invalid("image_truncated", f"The {kind} image is cut short. qemu-img said: {words}", "Fetch it again.")
    return Invalid("image_corrupt", f"The {kind} image is damaged. qemu-img said: {words}", "Check the source.")
