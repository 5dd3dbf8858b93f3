"""Builds the tiny guest: Debian's cloud kernel and busybox, nothing else, in user space within seconds even under TCG.

It exists for demonstrations, probes and tests: a machine that answers on its serial console, has a network, obeys the
power button and needs no firmware. Refuses to touch the host's root file system: the packages are fetched and unpacked
in a private folder and nothing is installed.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from colmeia.host.process import run
from colmeia.model.errors import ColmeiaError, Unavailable
from colmeia.storage.interface import BuiltImage, Progress

KERNEL_PACKAGE = "linux-image-cloud-amd64"
DISK_MIB = 64
ARGUMENTS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests"
    " 8250.nr_uarts=1"
)

_MODULES = (
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "ext4",
    "button", "evdev", "virtio_console", "virtio-rng", "virtio_balloon",
)  # fmt: skip

_INIT = r"""#!/bin/sh
# First process of the tiny guest: devices, name, network, a line that says "ready", then a root shell per console.
export PATH=/bin HOME=/root TERM=vt100 PS1='\h:\w# '
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in $(cat /modules/order); do insmod /modules/$m; done 2>/dev/null

hostname tiny
seed=$(findfs LABEL=cidata 2>/dev/null || findfs LABEL=CIDATA 2>/dev/null)
if [ -n "$seed" ] && mount -t iso9660 -o ro "$seed" /seed 2>/dev/null; then
    name=$(sed -n 's/.*local-hostname"\{0,1\}: *"\{0,1\}\([A-Za-z0-9.-]\{1,63\}\).*/\1/p' /seed/meta-data | head -n 1)
    [ -n "$name" ] && hostname "$name"
fi
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
fi
for disk in /dev/vda /dev/sda; do
    [ -b $disk ] && mount -t ext4 $disk /data 2>/dev/null && break
done

power_off() { umount /data 2>/dev/null; sync; poweroff -f; }
button() { head -c 24 "$1" >/dev/null && power_off; }
for input in /sys/class/input/event*; do
    if grep -q 'Power Button' $input/device/name 2>/dev/null; then button /dev/input/${input##*/} & fi
done

console() {
    cd /root
    while :; do setsid -c sh -l <"$1" >"$1" 2>&1; done
}
read up idle </proc/uptime
echo "COLMEIA-GUEST-READY $up" >/dev/console
for tty in $(cat /sys/class/tty/console/active); do
    [ $tty = tty0 ] && tty=tty1
    console /dev/$tty &
done
while :; do wait; sleep 1; done
"""

_PROFILE = """export PATH=/bin HOME=/root PS1='\\h:\\w# '
poweroff() { umount /data 2>/dev/null; sync; /bin/busybox poweroff -f; }
reboot() { umount /data 2>/dev/null; sync; /bin/busybox reboot -f; }
"""


class Entry(NamedTuple):
    """One file of an initial RAM disk: its mode with type bits, its bytes, and the numbers of a device node."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def make_cpio(entries: Mapping[str, Entry]) -> bytes:
    """Return an initial RAM disk in the `newc` format (Linux Documentation/driver-api/early-userspace/buffer-format).

    Pure, with fixed times and owners: the same entries give the same bytes.
    """
    out = bytearray()
    for number, (name, entry) in enumerate([*entries.items(), ("TRAILER!!!", Entry(0))], start=1):
        path = name.encode() + b"\0"
        links = 2 if entry.mode & 0o170000 == 0o040000 else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(path), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        out += b"\0" * (-len(out) % 4) + entry.data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def order_modules(wanted: Iterable[str], needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the wanted modules and all they need, each after its needs; names not in ``needs`` are built in."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in needs:
            return
        for need in needs[name]:
            visit(need)
        order.append(name)

    for name in wanted:
        visit(_module_name(name))
    return order


async def build_tiny(target_dir: Path, cache_dir: Path, progress: Progress) -> BuiltImage:
    """Make `kernel`, `initrd` and `disk.qcow2` in ``target_dir``; packages are kept in ``cache_dir`` for the next time.

    Raises Unavailable when a program or a package cannot be had. May be run again at any time; cancel-safe.
    """
    packages = cache_dir / "tiny"
    await anyio.to_thread.run_sync(lambda: packages.mkdir(parents=True, exist_ok=True))
    await anyio.to_thread.run_sync(lambda: target_dir.mkdir(parents=True, exist_ok=True))
    progress(0.0, "fetching the kernel and busybox packages")
    kernel_package = await _real_kernel_package()
    unpacked = target_dir / "unpacked"
    try:
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(unpacked, ignore_errors=True))
        for share, package in ((0.1, kernel_package), (0.4, "busybox-static")):
            deb = await _fetch(package, packages)
            progress(share + 0.2, f"unpacking {package}")
            await run(["dpkg-deb", "-x", str(deb), str(unpacked)], timeout_s=120)
        progress(0.8, "making the initial RAM disk")
        await anyio.to_thread.run_sync(_write_boot_files, unpacked, target_dir)
        progress(0.9, "making the data disk")
        disk = await _make_disk(target_dir)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(unpacked, ignore_errors=True))
    progress(1.0, "the tiny guest is built")
    return BuiltImage(target_dir / "kernel", target_dir / "initrd", ARGUMENTS, disk, "tiny")


async def _real_kernel_package() -> str:
    """Return the versioned package that the kernel's meta package stands for."""
    shown = await run(["apt-cache", "depends", "--important", KERNEL_PACKAGE], timeout_s=60, check=False)
    match = re.search(rb"Depends: (linux-image-[0-9][^\s<]*)", shown.stdout)
    if match is None:
        raise Unavailable(
            "package_missing",
            f"The package {KERNEL_PACKAGE} is not in this host's package lists.",
            "Run: apt-get update (the host must be a Debian whose package source can be reached).",
        )
    return match[1].decode()


async def _fetch(package: str, folder: Path) -> Path:
    """Ensure the package's newest .deb is in ``folder``; apt checks its signature chain and hash, also when cached."""
    try:
        await run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package], cwd=folder, timeout_s=900)
    except ColmeiaError as error:
        if error.code != "program_failed":
            raise
        raise Unavailable(
            "package_missing", f"Cannot fetch the package {package}: {error.message}", "Run: apt-get update"
        ) from error
    found = await anyio.to_thread.run_sync(
        lambda: max(folder.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime, default=None)
    )
    if found is None:
        raise Unavailable("package_missing", f"apt-get left no file for the package {package}.", "Run: apt-get update")
    return found


async def _make_disk(target_dir: Path) -> Path:
    """Make a small empty ext4 disk, so that a VM of this image has something to write on."""
    raw, disk = target_dir / "data.raw", target_dir / "disk.qcow2"
    raw.unlink(missing_ok=True)
    try:
        await run(["mke2fs", "-q", "-t", "ext4", "-L", "data", "-m", "0", str(raw), f"{DISK_MIB}M"], timeout_s=60)
        await run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], timeout_s=60)
    finally:
        raw.unlink(missing_ok=True)
    return disk


def _module_name(name: str) -> str:
    return name.replace("-", "_")


def _needs(module: bytes) -> tuple[str, ...]:
    """Return the modules a .ko names in its .modinfo section (`depends=a,b`)."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return tuple(_module_name(name.decode()) for name in match[1].split(b",") if name) if match else ()


def _write_boot_files(unpacked: Path, target_dir: Path) -> None:
    """Write `kernel` and `initrd` from the unpacked packages."""
    kernel = next((unpacked / "boot").glob("vmlinuz-*"))
    files = {_module_name(path.stem): path for path in (unpacked / "lib/modules").rglob("*.ko")}
    wanted = order_modules(_MODULES, _LazyNeeds(files))
    shutil.copyfile(kernel, target_dir / "kernel")
    busybox = (unpacked / "bin/busybox").read_bytes()
    (target_dir / "initrd").write_bytes(make_cpio(_root(busybox, {name: files[name].read_bytes() for name in wanted})))


class _LazyNeeds(dict[str, tuple[str, ...]]):
    """What each module needs, read from its file when first asked."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__(dict.fromkeys(files, ()))
        self._files = files

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return _needs(self._files[name].read_bytes())


def _root(busybox: bytes, modules: Mapping[str, bytes]) -> dict[str, Entry]:
    """Return the guest's root file system. Not compressed: copying is cheaper than unpacking under TCG."""
    folder, program, text, link = 0o040755, 0o100755, 0o100644, 0o120777
    root = {name: Entry(folder) for name in ("bin", "dev", "proc", "sys", "root", "etc", "data", "seed", "tmp")}
    root |= {"sbin": Entry(link, b"bin"), "dev/console": Entry(0o020600, device=(5, 1))}
    root |= {"bin/busybox": Entry(program, busybox), "bin/sh": Entry(link, b"busybox")}
    root |= {"init": Entry(program, _INIT.encode()), "etc/profile": Entry(text, _PROFILE.encode())}
    root |= {"etc/passwd": Entry(text, b"root::0:0:root:/root:/bin/sh\n"), "etc/group": Entry(text, b"root:x:0:\n")}
    root |= {"etc/resolv.conf": Entry(text, b"nameserver 10.0.2.3\n")}
    root |= {"modules": Entry(folder), "modules/order": Entry(text, "".join(f"{m}.ko\n" for m in modules).encode())}
    root |= {f"modules/{name}.ko": Entry(text, data) for name, data in modules.items()}
    return root
