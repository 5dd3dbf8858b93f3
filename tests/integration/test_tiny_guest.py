"""The tiny guest really boots, knows its name, has a network and a disk, and obeys the power button."""

import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest

from colmeia.model.vm import CloudInit
from colmeia.storage.images import ImageStore
from colmeia.storage.interface import StoredImage
from colmeia.storage.seed import build_seed

pytestmark = pytest.mark.anyio

ID = "00112233445566aa"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageStore, StoredImage]:
    folder = tmp_path_factory.mktemp("tiny")
    store = ImageStore(folder / "images", folder / "cache")
    seen: list[float] = []
    stored = await store.build(ID, "tiny", progress=lambda share, message: seen.append(share))
    assert seen == sorted(seen) and seen[-1] == 1.0
    return store, stored


class Guest:
    """A bare QEMU with the tiny guest: its serial console and its QMP socket."""

    def __init__(self, process: anyio.abc.Process, qmp: Path) -> None:
        self.process = process
        self._qmp = qmp
        self.output = b""

    async def wait_output(self, pattern: bytes) -> re.Match[bytes]:
        assert self.process.stdout is not None
        with anyio.fail_after(60):
            while (found := re.search(pattern, self.output)) is None:
                self.output += await self.process.stdout.receive()
        return found

    async def type(self, text: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send(text.encode() + b"\n")

    async def execute(self, command: str) -> None:
        async with await anyio.connect_unix(self._qmp) as stream:
            for word in ("qmp_capabilities", command):
                await stream.receive()
                await stream.send(json.dumps({"execute": word}).encode())
            await stream.receive()


@asynccontextmanager
async def boot(tiny: tuple[ImageStore, StoredImage], folder: Path, disk_bus: str) -> AsyncIterator[Guest]:
    store, stored = tiny
    assert stored.boot is not None
    disk, seed, qmp = folder / "vm.qcow2", folder / "seed.iso", folder / "qmp"
    seed.write_bytes(build_seed(ID, "web1", CloudInit()))
    base = store.block_source(ID).path
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk], check=True)
    devices = {"virtio-blk": ["virtio-blk-pci,drive=d"], "virtio-scsi": ["virtio-scsi-pci", "scsi-hd,drive=d"]}[
        disk_bus
    ]
    argv = [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults",
        "-display", "none", "-serial", "stdio", "-qmp", f"unix:{qmp},server=on,wait=off",
        "-kernel", stored.boot.kernel, "-initrd", stored.boot.initrd, "-append", stored.boot.arguments,
        "-drive", f"file={disk},if=none,id=d", "-drive", f"file={seed},if=none,id=s,format=raw,readonly=on",
        *(word for device in devices for word in ("-device", device)), "-device", "virtio-blk-pci,drive=s",
        "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci",
        "-device", "virtio-balloon-pci", "-device", "virtio-serial-pci",
    ]  # fmt: skip
    process = await anyio.open_process(argv, stderr=subprocess.STDOUT)
    try:
        yield Guest(process, qmp)
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.aclose()


@pytest.mark.parametrize("disk_bus", ["virtio-blk", "virtio-scsi"])
async def test_the_guest_boots_and_obeys_the_power_button(
    tiny: tuple[ImageStore, StoredImage], tmp_path: Path, disk_bus: str
) -> None:
    async with boot(tiny, tmp_path, disk_bus) as guest:
        await guest.wait_output(rb"COLMEIA-GUEST-READY \d+\.\d+\r\n")
        assert len(guest.output.split(b"COLMEIA-GUEST-READY")[0].splitlines()) <= 3, guest.output
        await guest.wait_output(rb"web1:/root# ")
        await guest.type("echo name=$(hostname) user=$(id -u) $(mount | grep /data) over")
        seen = (await guest.wait_output(rb"name=web1 user=0.*over\r\n"))[0]
        assert b"on /data type ext4 (rw" in seen
        await guest.type("ping -c 1 -W 5 10.0.2.2 >/dev/null && echo net''work works")
        await guest.wait_output(rb"network works")
        guest.output = b""
        await guest.type("exit")
        await guest.wait_output(rb"built-in shell[\s\S]*web1:/root# ")
        await guest.type("echo shell is back: $((40+2))")
        await guest.wait_output(rb"shell is back: 42")
        await guest.execute("system_powerdown")
        with anyio.fail_after(20):
            assert await guest.process.wait() == 0


async def test_building_again_changes_nothing(tiny: tuple[ImageStore, StoredImage]) -> None:
    store, stored = tiny
    assert stored.os == "tiny" and stored.boot is not None
    before = Path(stored.boot.initrd).stat()
    assert await store.build(ID, "tiny", progress=lambda share, message: None) == stored
    assert Path(stored.boot.initrd).stat() == before
