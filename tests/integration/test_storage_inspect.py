"""Images made to harm, and images that are broken, are refused before anything opens them."""

import struct
import subprocess
from pathlib import Path

import pytest

from colmeia.model.base import MIB
from colmeia.model.errors import Invalid
from colmeia.model.image import ImageFormat
from colmeia.storage.inspect import inspect

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw disk of 8 MiB that does not compress."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(number.to_bytes(4, "big") for number in range(2 * MIB)))
    return path


async def refused(path: Path, expected: ImageFormat | None = None) -> str:
    with pytest.raises(Invalid) as caught:
        await inspect(path, expected)
    assert caught.value.message and caught.value.hint
    return caught.value.code


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qcow2", []),
        ("qcow2", ["-o", "compat=0.10"]),
        ("qcow2", ["-c"]),
        ("vmdk", []),
        ("vmdk", ["-o", "subformat=streamOptimized"]),
        ("vdi", []),
        ("vhdx", []),
        ("vpc", []),
        ("vpc", ["-o", "subformat=fixed"]),
    ],
)
async def test_each_format_is_found_by_itself(tmp_path: Path, raw: Path, kind: str, options: list[str]) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", kind, *options, raw, path)
    found = await inspect(path)
    assert found.format is ImageFormat(kind)
    assert 8 * MIB <= found.virtual_size < 9 * MIB


async def test_raw_is_taken_only_when_asked_for(raw: Path) -> None:
    assert await refused(raw) == "image_format"
    assert (await inspect(raw, ImageFormat.RAW)).virtual_size == 8 * MIB
    assert await refused(raw, ImageFormat.QCOW2) == "image_format"


async def test_another_format_than_said_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / "image", "8M")
    assert await refused(tmp_path / "image", ImageFormat.RAW) == "image_format"
    assert await refused(tmp_path / "image", ImageFormat.VMDK) == "image_format"


async def test_a_backing_file_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", tmp_path / "image", "8M")
    assert await refused(tmp_path / "image") == "image_backing_file"


async def test_a_json_backing_file_is_refused(tmp_path: Path) -> None:
    backing = 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}'
    qemu_img("create", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", tmp_path / "image", "8M")
    assert await refused(tmp_path / "image") == "image_backing_file"


async def test_a_data_file_is_refused(tmp_path: Path) -> None:
    options = f"data_file={tmp_path / 'data'},data_file_raw=on"
    qemu_img("create", "-f", "qcow2", "-o", options, tmp_path / "image", "8M")
    assert await refused(tmp_path / "image") == "image_data_file"


async def test_an_encrypted_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, "8M")
    data = bytearray(path.read_bytes())
    struct.pack_into(">I", data, 32, 2)  # LUKS
    path.write_bytes(data)
    assert await refused(path) == "image_format"


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
async def test_a_vmdk_of_several_files_is_refused(tmp_path: Path, raw: Path, kind: str) -> None:
    path = tmp_path / "image.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", raw, path)
    assert await refused(path) == "image_data_file"


async def test_a_vmdk_whose_descriptor_names_a_file_of_the_host_is_refused(tmp_path: Path, raw: Path) -> None:
    path = tmp_path / "image.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", raw, path)
    data = bytearray(path.read_bytes())
    data[12:20] = bytes(8)  # no capacity: QEMU then follows the descriptor's extents
    path.write_bytes(data)
    assert await refused(path) == "image_data_file"


async def test_a_vmdk_with_a_parent_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "vmdk", tmp_path / "parent.vmdk", "8M")
    qemu_img("create", "-f", "vmdk", "-b", tmp_path / "parent.vmdk", "-F", "vmdk", tmp_path / "image.vmdk")
    assert await refused(tmp_path / "image.vmdk") == "image_backing_file"


@pytest.mark.parametrize("options", [[], ["-c"]])
@pytest.mark.parametrize("kept", [10, 60, 300, 1_000_000, -65_537])
async def test_a_truncated_qcow2_is_refused(tmp_path: Path, raw: Path, options: list[str], kept: int) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    assert await refused(path) in ("image_truncated", "image_corrupt")


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vpc", "vhdx"])
@pytest.mark.parametrize("kept", [200, 5_000, -1_100_000])
async def test_a_truncated_image_of_another_kind_is_refused(tmp_path: Path, raw: Path, kind: str, kept: int) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", kind, raw, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert await refused(path) in ("image_truncated", "image_corrupt", "image_format")


async def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    assert await refused(tmp_path / "image") == "image_truncated"
    assert await refused(tmp_path / "image", ImageFormat.RAW) == "image_truncated"


async def test_an_absurd_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, "65T")
    assert await refused(path) == "image_too_large"


async def test_a_qcow2_with_absurd_tables_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, "8M")
    data = bytearray(path.read_bytes())
    struct.pack_into(">I", data, 36, 0x7FFFFFFF)  # L1 entries
    path.write_bytes(data)
    assert await refused(path) == "image_corrupt"
