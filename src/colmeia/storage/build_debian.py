"""Builds a Debian cloud image from the distribution's own packages, as the host's own package sources offer them.

No loop device and no mount of the image: the root file system is written straight into its partition. The result
boots by BIOS and by UEFI, waits for cloud-init's NoCloud seed, and carries no identity: no machine id, no ssh host
keys, no password, and none of the host's package sources (cloud-init writes Debian's own at first boot).
Refuses to build without root, because a root file system has owners and device nodes.
"""

import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from colmeia.host.process import find_program, run
from colmeia.model.base import GIB, MIB
from colmeia.model.errors import Invalid, Unavailable
from colmeia.storage.interface import BuiltImage, Progress

SUITES = {"12": "bookworm"}
PACKAGES = (
    "linux-image-cloud-amd64", "systemd-sysv", "systemd-resolved", "udev", "dbus", "libpam-systemd", "kmod", "iproute2",
    "iputils-ping", "netbase", "cloud-init", "cloud-guest-utils", "qemu-guest-agent", "openssh-server", "sudo",
    "ca-certificates", "netplan.io", "e2fsprogs", "gdisk", "fdisk", "less", "nano", "curl", "initramfs-tools", "zstd",
)  # fmt: skip

SECTOR = 512
_BIOS_FIRST, _ESP_FIRST, _ROOT_FIRST = 2048, 4096, 69632  # sectors: 1 MiB for GRUB's core, 32 MiB for the ESP
DISK_BYTES = 3 * GIB
_ROOT_BYTES = DISK_BYTES - _ROOT_FIRST * SECTOR - MIB  # the last MiB holds the second partition table
_ROOT_LAST = _ROOT_FIRST + _ROOT_BYTES // SECTOR - 1

_GRUB_MODULES = ("part_gpt", "ext2", "search", "search_label", "normal", "configfile", "linux", "boot", "echo", "test")
_GRUB_EARLY = "search --no-floppy --label root --set root\nset prefix=($root)/boot/grub\nnormal\n"
_GRUB_CONFIG = """# Plain on purpose: /vmlinuz and /initrd.img follow the newest kernel, so nothing has to be generated.
set timeout=0
linux /vmlinuz root=LABEL=root ro console=tty0 console=ttyS0,115200 quiet net.ifnames=0
initrd /initrd.img
boot
"""

_CLOUD_CONFIG = """# What a cloud image needs, and nothing that costs seconds at first boot.
datasource_list: [ NoCloud, ConfigDrive, None ]
apt: { preserve_sources_list: false }
ssh_genkeytypes: [ ed25519, ecdsa ]
ssh_quiet_keygen: true
ssh: { emit_keys_to_console: false }
cloud_init_modules: [ seed_random, bootcmd, write-files, growpart, resizefs, disk_setup, mounts, set_hostname,
  update_hostname, update_etc_hosts, ca-certs, users-groups, ssh ]
cloud_config_modules: [ ssh-import-id, set-passwords, apt-configure, ntp, timezone, runcmd ]
cloud_final_modules: [ package-update-upgrade-install, write-files-deferred, scripts-vendor, scripts-per-once,
  scripts-per-boot, scripts-per-instance, scripts-user, phone-home, final-message, power-state-change ]
"""

_BEFORE_PACKAGES = {
    "etc/initramfs-tools/conf.d/colmeia": "MODULES=list\nCOMPRESS=zstd\n",
    "usr/share/initramfs-tools/modules.d/colmeia": "\n".join(
        ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "sd_mod", "nvme", "xen-blkfront", "hv_storvsc", "")
    ),
}
_AFTER_PACKAGES = {
    "etc/machine-id": "",
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/fstab": "LABEL=root / ext4 errors=remount-ro 0 1\nLABEL=ESP /boot/efi vfat umask=0077,nofail 0 1\n",
    "etc/apt/sources.list": "# Written by cloud-init at first boot.\n",
    "etc/cloud/cloud.cfg.d/90_colmeia.cfg": _CLOUD_CONFIG,
    "boot/grub/grub.cfg": _GRUB_CONFIG,
}
_REMOVE = (
    "etc/ssh/ssh_host_*", "etc/apt/sources.list.d/*", "etc/apt/apt.conf.d/99mmdebstrap", "var/lib/apt/lists/*",
    "var/cache/apt/*", "var/log/*.log", "var/log/apt/*", "var/lib/dbus/machine-id", "root/.bash_history",
)  # fmt: skip
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer")
_SHARES = (  # what mmdebstrap says, and how far the whole build is then
    (b"running apt-get update", 0.02, "reading the package lists"),
    (b"downloading packages", 0.06, "fetching the base packages"),
    (b"extracting archives", 0.12, "unpacking the base packages"),
    (b"installing essential packages", 0.16, "installing the base packages"),
    (b"installing remaining packages", 0.25, "installing kernel, cloud-init, ssh and guest agent"),
    (b"cleaning package lists", 0.75, "cleaning up"),
)


class Source(NamedTuple):
    """One line of a package source: options such as ``signed-by=…``, where it is, and what is taken from there."""

    options: str
    uri: str
    suite: str
    components: str

    def __str__(self) -> str:
        options = f"[{self.options}] " if self.options else ""
        return f"deb {options}{self.uri} {self.suite} {self.components}"


def read_sources(texts: Iterable[str], codename: str) -> list[Source]:
    """Return the sources for one Debian release out of sources.list and deb822 texts (sources.list(5)).

    Only the suites of the release itself count (NAME, NAME-updates, NAME-security); sources of other vendors do not.
    """
    suites = (codename, f"{codename}-updates", f"{codename}-security")
    found: list[Source] = []
    for text in texts:
        for line in text.splitlines():
            match = re.fullmatch(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(\S.*)", line.strip())
            if match and match[3] in suites and "main" in match[4].split():
                found.append(Source((match[1] or "").strip(), match[2], match[3], "main"))
        for stanza in re.split(r"\n\s*\n", text):
            lines = [line for line in stanza.splitlines() if ":" in line and not line.startswith("#")]
            fields = {key.strip().lower(): value.strip() for key, value in (line.split(":", 1) for line in lines)}
            if "deb" not in fields.get("types", "").split() or "main" not in fields.get("components", "").split():
                continue
            key = fields.get("signed-by", "")
            found += [
                Source(f"signed-by={key}" if key.startswith("/") else "", uri, suite, "main")
                for uri in fields.get("uris", "").split()
                for suite in fields.get("suites", "").split()
                if suite in suites
            ]
    return list(dict.fromkeys(found))


def patch_boot_sector(boot_image: bytes, mbr: bytes, core_first_sector: int) -> bytes:
    """Return the first sector of a disk that loads GRUB's core from ``core_first_sector`` (in sectors).

    As grub-setup does (GRUB 2.06, util/setup.c and boot/i386/pc/boot.S): the core's sector as 8 bytes at 0x5c, no
    check of the drive number (two NOPs at 0x66), and the disk's own partition table from byte 440 on.
    """
    sector = bytearray(boot_image[:SECTOR])
    struct.pack_into("<Q", sector, 0x5C, core_first_sector)
    sector[0x66:0x68] = b"\x90\x90"
    sector[440:SECTOR] = mbr[440:SECTOR]
    return bytes(sector)


def patch_core(core: bytes, first_sector: int) -> bytes:
    """Return GRUB's core image with its own block list: the rest of it follows right after its first sector.

    The last 12 bytes of the first sector are the first block list entry: start (8), length in sectors (2) and the
    segment it is loaded to (2), which stays (GRUB 2.06, boot/i386/pc/diskboot.S).
    """
    padded = bytearray(core + b"\0" * (-len(core) % SECTOR))
    struct.pack_into("<QH", padded, SECTOR - 12, first_sector + 1, len(padded) // SECTOR - 1)
    return bytes(padded)


async def build_debian(release: str, target_dir: Path, cache_dir: Path, progress: Progress) -> BuiltImage:
    """Make `disk.qcow2` in ``target_dir``: Debian of ``release`` ('12'), ready for cloud-init.

    Takes 2 to 5 minutes and 3 GiB of space. Raises Invalid for an unknown release and Unavailable for a missing
    program, package or right. May be run again at any time; cancel-safe: no process, mount or half tree stays.
    """
    codename = SUITES.get(release)
    if codename is None:
        raise Invalid("unknown_recipe", f"There is no recipe for Debian {release!r}.", f"Known: {', '.join(SUITES)}.")
    await anyio.to_thread.run_sync(_check_host)
    work = target_dir / "work"
    await anyio.to_thread.run_sync(_fresh_folder, work)
    try:
        sources = await anyio.to_thread.run_sync(_host_sources, codename)
        root, raw, disk = work / "root", work / "disk.raw", target_dir / "disk.qcow2"
        await _install_packages(codename, sources, work, root, progress)
        await anyio.to_thread.run_sync(_finish_root, root)
        progress(0.80, "writing the file systems")
        await _write_disk(raw, root, work)
        progress(0.88, "compressing the image")
        await _convert(raw, disk, progress)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(work, ignore_errors=True))
    progress(1.0, f"Debian {release} is built")
    return BuiltImage(None, None, "", disk, f"debian/{release}")


def _check_host() -> None:
    if os.geteuid() != 0:
        raise Unavailable(
            "not_root", "Building a Debian image needs root.", "Run the daemon as root, or import an image."
        )
    for program in ("mmdebstrap", "sgdisk", "mke2fs", "mkfs.vfat", "mcopy", "grub-mkimage", "qemu-img", "unshare"):
        find_program(program)
    for path in ("/usr/lib/grub/i386-pc/boot.img", "/usr/lib/grub/x86_64-efi/normal.mod"):
        if not Path(path).exists():
            raise Unavailable(
                "program_missing",
                f"GRUB's files are not here: {path}.",
                "Run: apt-get install grub-pc-bin grub-efi-amd64-bin",
            )


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _host_sources(codename: str) -> list[Source]:
    """Read the host's own package sources for the release."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    texts = [
        file.read_text(errors="replace") for file in files if file.suffix in (".list", ".sources") and file.is_file()
    ]
    sources = read_sources(texts, codename)
    if not any(source.suite == codename for source in sources):
        raise Unavailable(
            "package_missing",
            f"This host's package sources do not offer Debian {codename}.",
            f"Add a source for {codename} to /etc/apt/sources.list.d, or import a ready image.",
        )
    return sources


async def _install_packages(codename: str, sources: list[Source], work: Path, root: Path, progress: Progress) -> None:
    """Run mmdebstrap in namespaces of its own, so that its mounts and processes vanish with it whatever happens."""
    before, source_file = work / "before", work / "sources.list"
    await anyio.to_thread.run_sync(_write_files, before, _BEFORE_PACKAGES)
    source_file.write_text("".join(f"{source}\n" for source in sources))
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    await run(
        [
            *namespaces, "mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory",
            f"--include={','.join(PACKAGES)}",
            "--aptopt=APT::Install-Recommends false", "--aptopt=APT::Sandbox::User root",
            "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=path-exclude=/usr/share/locale/*",
            f"--essential-hook=sync-in {before} /",
            codename, str(root), str(source_file),
        ],
        timeout_s=3600,
        env={"TMPDIR": str(work), "DEBIAN_FRONTEND": "noninteractive"},
        on_output=_follow(progress),
    )  # fmt: skip


def _follow(progress: Progress) -> Callable[[bytes], None]:
    def on_output(piece: bytes) -> None:
        for marker, share, message in _SHARES:
            if marker in piece:
                progress(share, message)

    return on_output


def _write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)


def _finish_root(root: Path) -> None:
    """Give the tree its configuration and take away what makes a machine an individual."""
    for pattern in _REMOVE:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    _write_files(root, _AFTER_PACKAGES)
    (root / "boot/efi").mkdir(exist_ok=True)
    resolv = root / "etc/resolv.conf"
    resolv.unlink(missing_ok=True)
    resolv.symlink_to("../run/systemd/resolve/stub-resolv.conf")
    wanted = root / "etc/systemd/system"
    for unit in _MASKED:
        (wanted / unit).unlink(missing_ok=True)
        (wanted / unit).symlink_to("/dev/null")
    for unit in ("vmlinuz", "initrd.img"):
        if not (root / unit).exists():
            _link_newest(root, unit)


def _link_newest(root: Path, name: str) -> None:
    newest = max((root / "boot").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise Unavailable(
            "build_failed", f"The packages left no {name} in /boot.", "Try again; see the operation's log."
        )
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(f"boot/{newest.name}")


async def _write_disk(raw: Path, root: Path, work: Path) -> None:
    """Write partition table, loaders and file systems into a sparse file."""
    await anyio.to_thread.run_sync(_make_sparse, raw)
    await run(
        [
            "sgdisk", "--clear",
            f"--new=1:{_BIOS_FIRST}:{_ESP_FIRST - 1}", "--typecode=1:ef02", "--change-name=1:grub",
            f"--new=2:{_ESP_FIRST}:{_ROOT_FIRST - 1}", "--typecode=2:ef00", "--change-name=2:esp",
            f"--new=3:{_ROOT_FIRST}:{_ROOT_LAST}", "--typecode=3:8304", "--change-name=3:root",
            str(raw),
        ],
        timeout_s=60,
    )  # fmt: skip
    await run(
        [
            "mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-O", "^metadata_csum_seed,^orphan_file",
            "-E", f"offset={_ROOT_FIRST * SECTOR},root_owner=0:0", "-d", str(root), str(raw), f"{_ROOT_BYTES // 1024}k",
        ],
        timeout_s=900,
    )  # fmt: skip
    await _write_loaders(raw, work)


async def _write_loaders(raw: Path, work: Path) -> None:
    early, core, loader, esp = work / "early.cfg", work / "core.img", work / "bootx64.efi", work / "esp.img"
    early.write_text(_GRUB_EARLY)
    common = ["grub-mkimage", "-c", str(early), "-p", "/boot/grub"]
    await run([*common, "-O", "i386-pc", "-o", str(core), "biosdisk", *_GRUB_MODULES], timeout_s=60)
    await run([*common, "-O", "x86_64-efi", "-o", str(loader), "efi_gop", *_GRUB_MODULES], timeout_s=60)
    esp_kib = (_ROOT_FIRST - _ESP_FIRST) * SECTOR // 1024
    await run(["mkfs.vfat", "-C", "-n", "ESP", str(esp), str(esp_kib)], timeout_s=60)
    await run(["mmd", "-i", str(esp), "::/EFI", "::/EFI/BOOT"], timeout_s=60)
    await run(["mcopy", "-i", str(esp), str(loader), "::/EFI/BOOT/BOOTX64.EFI"], timeout_s=60)
    await anyio.to_thread.run_sync(_place_loaders, raw, core, esp)


def _make_sparse(raw: Path) -> None:
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)


def _place_loaders(raw: Path, core: Path, esp: Path) -> None:
    boot_image = Path("/usr/lib/grub/i386-pc/boot.img").read_bytes()
    with raw.open("r+b") as file:
        mbr = file.read(SECTOR)
        file.seek(0)
        file.write(patch_boot_sector(boot_image, mbr, _BIOS_FIRST))
        file.seek(_BIOS_FIRST * SECTOR)
        file.write(patch_core(core.read_bytes(), _BIOS_FIRST))
        file.seek(_ESP_FIRST * SECTOR)
        file.write(esp.read_bytes())


async def _convert(raw: Path, disk: Path, progress: Progress) -> None:
    part = disk.with_suffix(".part")
    options = ["-c", "-o", "compression_type=zstd", "-m", "8", "-W"]
    await run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(part)], timeout_s=1800)
    await anyio.to_thread.run_sync(os.replace, part, disk)
