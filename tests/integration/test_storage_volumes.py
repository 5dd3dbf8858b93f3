"""Volumes in a folder: made whole or not at all."""

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from colmeia.model.base import GIB, MIB
from colmeia.model.block import BlockFormat, BlockSource
from colmeia.model.errors import Internal, Invalid, Unavailable
from colmeia.storage.directory import DirectoryPool

pytestmark = pytest.mark.anyio

VOLUME = "00112233445566aa-root"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def image(tmp_path: Path) -> BlockSource:
    path = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    return BlockSource(path=str(path), format=BlockFormat.QCOW2, read_only=True)


def info(path: str) -> dict[str, Any]:
    done = subprocess.run(["qemu-img", "info", "--output", "json", path], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def test_a_volume_is_a_copy_on_write_child_of_its_image(tmp_path: Path, image: BlockSource) -> None:
    pool = DirectoryPool(tmp_path / "volumes")
    found = await pool.ensure_volume(VOLUME, size_bytes=GIB, backing=image)
    assert found == pool.block_source(VOLUME, backing=image)
    assert found.backing == image
    seen = info(found.path)
    assert (seen["virtual-size"], seen["backing-filename"], seen["backing-filename-format"]) == (
        GIB,
        image.path,
        "qcow2",
    )
    assert stat.S_IMODE(Path(found.path).stat().st_mode) == 0o600


async def test_ensuring_again_touches_nothing(tmp_path: Path) -> None:
    pool = DirectoryPool(tmp_path / "volumes")
    found = await pool.ensure_volume(VOLUME, size_bytes=GIB, backing=None)
    before = Path(found.path).stat()
    assert await pool.ensure_volume(VOLUME, size_bytes=2 * GIB, backing=None) == found
    assert Path(found.path).stat() == before


async def test_what_a_crash_left_half_made_is_replaced(tmp_path: Path) -> None:
    pool = DirectoryPool(tmp_path / "volumes")
    (tmp_path / "volumes").mkdir()
    (tmp_path / "volumes" / f"{VOLUME}.qcow2.new").write_bytes(b"half")
    await pool.ensure_volume(VOLUME, size_bytes=MIB, backing=None)
    assert os.listdir(tmp_path / "volumes") == [f"{VOLUME}.qcow2"]


async def test_a_disk_smaller_than_its_image_is_refused(tmp_path: Path, image: BlockSource) -> None:
    with pytest.raises(Invalid) as caught:
        await DirectoryPool(tmp_path / "volumes").ensure_volume(VOLUME, size_bytes=63 * MIB, backing=image)
    assert caught.value.code == "disk_smaller_than_image"
    assert "64MiB" in caught.value.hint


async def test_delete_may_be_repeated(tmp_path: Path) -> None:
    pool = DirectoryPool(tmp_path / "volumes")
    await pool.ensure_volume(VOLUME, size_bytes=MIB, backing=None)
    for _ in range(2):
        await pool.delete_volume(VOLUME)
    assert os.listdir(tmp_path / "volumes") == []


@pytest.mark.parametrize("volume_id", ["../../etc/passwd", "", ".hidden", "a/b", "a\0b"])
async def test_what_is_no_volume_id_is_refused(tmp_path: Path, volume_id: str) -> None:
    with pytest.raises(Internal):
        await DirectoryPool(tmp_path).delete_volume(volume_id)


async def test_a_cancelled_call_leaves_nothing_half_made(tmp_path: Path) -> None:
    pool = DirectoryPool(tmp_path / "volumes")
    for delay_ms in range(0, 40, 4):
        with anyio.move_on_after(delay_ms / 1000):
            await pool.ensure_volume(VOLUME, size_bytes=MIB, backing=None)
        names = os.listdir(tmp_path / "volumes") if (tmp_path / "volumes").exists() else []
        assert names in ([], [f"{VOLUME}.qcow2"])
        await pool.delete_volume(VOLUME)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    (folder / "filler").write_bytes(bytes(200 * 1024))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_named_and_nothing_stays(full_disk: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        await DirectoryPool(full_disk).ensure_volume(VOLUME, size_bytes=GIB, backing=None)
    assert caught.value.code == "disk_full"
    assert os.listdir(full_disk) == ["filler"]
