"""Images in one folder each: fetched, checked, rewritten as plain qcow2, and read-only from then on.

    ROOT/IMAGEID/image.json   written last: an image without it is not there yet
                 disk.qcow2   what VMs are copy-on-write children of
                 kernel, initrd   of a direct-boot image
                 source.part  what was fetched so far; continued by the next attempt

A stranger's image is never handed to a VM as it came: it is inspected, then rewritten by qemu-img from a private copy,
so that nothing it says about other files, snapshots or odd features reaches the engine. Every call may be cut short
at any point and made again.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import anyio.to_thread

from colmeia.host.process import failure, run
from colmeia.model.base import GIB, MIB, Model
from colmeia.model.block import BlockFormat, BlockSource, BootFiles
from colmeia.model.errors import ColmeiaError, Internal, Invalid, NotFound
from colmeia.model.image import ImageFormat
from colmeia.storage.build_debian import SUITES, build_debian
from colmeia.storage.build_tiny import build_tiny
from colmeia.storage.download import check_url, download, forget_part
from colmeia.storage.inspect import Inspected, inspect, limited, qcow2_virtual_size
from colmeia.storage.interface import BuiltImage, Progress, StoredImage
from colmeia.storage.space import free_bytes, is_disk_full, no_space, reserve_bytes

_IMAGE_ID = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")
_PIECE = 4 * MIB
_CONVERT_TIMEOUT_S = 6 * 3600
_EXPORT_OPTIONS = {ImageFormat.VMDK: ["-o", "subformat=streamOptimized"]}
RECIPES = ("tiny", *(f"debian/{release}" for release in SUITES))


class _Record(Model):
    """What `image.json` says."""

    sha256: str
    source_format: str
    arguments: str = ""
    os: str = ""


class ImageStore:
    """Images under ``root``; ``cache`` keeps packages between builds and exports while they are read."""

    def __init__(self, root: Path, cache: Path) -> None:
        self._root = root
        self._cache = cache

    def check_recipe(self, recipe: str) -> None:
        """Raise Invalid (`unknown_recipe`) for a recipe that is not known."""
        if recipe not in RECIPES:
            raise Invalid("unknown_recipe", f"There is no recipe {recipe!r}.", f"Known: {', '.join(RECIPES)}.")

    async def import_image(
        self,
        image_id: str,
        source: str,
        *,
        format: ImageFormat | None,  # noqa: A002
        sha256: str | None,
        progress: Progress,
    ) -> StoredImage:
        """Ensure the image is stored, from a URL or an absolute path on this host.

        Idempotent; killed or cancelled at any point, the next call goes on with the download where it stopped.
        Raises Invalid (`checksum_mismatch`, `source_url`, `source_path` and those of `inspect`), NotFound
        (`source_missing`), Unavailable (`disk_full`, `download_failed`).
        """
        folder = self._folder(image_id)
        found = await anyio.to_thread.run_sync(_read_record, folder)
        if found is not None:
            return found
        await anyio.to_thread.run_sync(lambda: folder.mkdir(mode=0o711, parents=True, exist_ok=True))
        part = folder / "source.part"
        digest = await _fetch(source, part, _within(progress, 0.0, 0.6))
        try:
            if sha256 is not None and digest != sha256.lower():
                raise Invalid(
                    "checksum_mismatch",
                    f"The source's SHA-256 is {digest}, not {sha256.lower()} as was said.",
                    "Check the checksum, or whether the source was changed.",
                )
            progress(0.6, "looking at the image")
            seen = await inspect(part, format)
            await _convert(part, seen, folder / "disk.qcow2", _within(progress, 0.65, 1.0))
        except ColmeiaError:
            await anyio.to_thread.run_sync(forget_part, part)
            raise
        record = _Record(sha256=digest, source_format=seen.format.value)
        return await anyio.to_thread.run_sync(_finish, folder, record)

    async def build(self, image_id: str, recipe: str, *, progress: Progress) -> StoredImage:
        """Ensure the image is built from the distribution's packages. Idempotent; starts over when cut short."""
        self.check_recipe(recipe)
        folder = self._folder(image_id)
        found = await anyio.to_thread.run_sync(_read_record, folder)
        if found is not None:
            return found
        work = folder / "build"
        await anyio.to_thread.run_sync(lambda: work.mkdir(mode=0o711, parents=True, exist_ok=True))
        try:
            name, _, release = recipe.partition("/")
            if name == "tiny":
                built = await build_tiny(work, self._cache, progress)
            else:
                built = await build_debian(release, work, self._cache, progress)
            await anyio.to_thread.run_sync(_take, built, folder)
        except OSError as error:
            if is_disk_full(error):
                raise no_space(f"build {recipe}", folder) from error
            raise
        except ColmeiaError as error:
            if is_disk_full(error.message.encode()):
                raise no_space(f"build {recipe}", folder) from error
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(lambda: shutil.rmtree(work, ignore_errors=True))
        record = _Record(sha256="", source_format="qcow2", arguments=built.arguments, os=built.os)
        return await anyio.to_thread.run_sync(_finish, folder, record)

    async def delete(self, image_id: str) -> None:
        """Ensure the image is gone. Idempotent. The caller has made sure that no volume is a child of it."""
        await anyio.to_thread.run_sync(_remove, self._folder(image_id))

    async def export(self, image_id: str, format: ImageFormat) -> AsyncIterator[bytes]:  # noqa: A002
        """Yield the image's bytes in ``format``; other formats than qcow2 are converted into the cache first.

        Raises NotFound `image_missing`, Unavailable `disk_full`. Leaves nothing behind, also when it is abandoned.
        """
        disk = Path(self.block_source(image_id).path)
        if format is ImageFormat.QCOW2:
            async with await anyio.open_file(disk, "rb") as file:
                while piece := await file.read(_PIECE):
                    yield piece
            return
        target = self._cache / f"export-{image_id}-{os.urandom(4).hex()}.{format.value}"
        await anyio.to_thread.run_sync(lambda: self._cache.mkdir(mode=0o700, parents=True, exist_ok=True))
        try:
            await self.export_to(image_id, target, format, lambda share, message: None)
            async with await anyio.open_file(target, "rb") as file:
                while piece := await file.read(_PIECE):
                    yield piece
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.Path(target).unlink(missing_ok=True)

    async def export_to(self, image_id: str, target: Path, into: ImageFormat, progress: Progress) -> None:
        """Write the image to ``target`` in the format ``into``; a half-written file is removed."""
        disk = Path(self.block_source(image_id).path)
        argv = ["qemu-img", "convert", "-p", "-f", "qcow2", "-O", into.value, *_EXPORT_OPTIONS.get(into, [])]
        try:
            await _run_convert([*argv, str(disk), str(target)], target.parent, progress, "exporting")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.Path(target).unlink(missing_ok=True)
            raise

    def block_source(self, image_id: str) -> BlockSource:
        """Return how the image's disk is opened. Raises NotFound `image_missing` when its bytes are not there."""
        disk = self._folder(image_id) / "disk.qcow2"
        if not disk.is_file():
            raise NotFound("image_missing", f"The bytes of image {image_id} are not on this host.", "Import it again.")
        return BlockSource(path=str(disk), format=BlockFormat.QCOW2, read_only=True)

    def boot_files(self, image_id: str) -> BootFiles | None:
        """Return kernel and initial RAM disk of a direct-boot image, None for one that boots by itself."""
        found = _read_record(self._folder(image_id))
        return None if found is None else found.boot

    def _folder(self, image_id: str) -> Path:
        if not _IMAGE_ID.fullmatch(image_id):
            raise Internal("image_id", f"{image_id!r} is not an image id.")
        return self._root / image_id


def _within(progress: Progress, first: float, last: float) -> Progress:
    """Return a progress for one part of the work."""
    return lambda share, message: progress(first + (last - first) * share, message)


async def _fetch(source: str, part: Path, progress: Progress) -> str:
    """Ensure the source's bytes are in ``part`` and return their SHA-256."""
    if source.startswith("/"):
        return await anyio.to_thread.run_sync(_copy_file, Path(source), part, progress, abandon_on_cancel=False)
    if "://" not in source:
        raise Invalid("source_path", "The source is no URL and no absolute path.", "Write /PATH/TO/FILE or https://….")
    check_url(source)
    return await download(source, part, progress)


def _copy_file(source: Path, part: Path, progress: Progress) -> str:
    """Copy a file of this host and hash it on the way, so that nobody can change it after it was checked."""
    fd = _open_regular(source)
    with os.fdopen(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        forget_part(part)
        if size + reserve_bytes(part.parent) > free_bytes(part.parent):
            raise no_space(f"copy {source}", part.parent, size)
        digest, done = hashlib.sha256(), 0
        try:
            out_fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(out_fd, "wb", buffering=0) as out:
                while piece := file.read(_PIECE):
                    anyio.from_thread.check_cancelled()
                    digest.update(piece)
                    done += len(piece)
                    _write_or_skip(out_fd, piece)
                    share, message = min(done / max(size, 1), 1.0), f"copied {done / MIB:.0f} of {size / MIB:.0f} MiB"
                    anyio.from_thread.run_sync(progress, share, message)
                out.truncate(done)
        except OSError as error:
            forget_part(part)
            if is_disk_full(error):
                raise no_space(f"copy {source}", part.parent, size) from error
            raise
    return digest.hexdigest()


def _write_or_skip(fd: int, piece: bytes) -> None:
    """Write a piece; one of zeros alone becomes a hole."""
    if not any(memoryview(piece)[:64]) and piece.count(0) == len(piece):
        os.lseek(fd, len(piece), os.SEEK_CUR)
        return
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]


def _open_regular(source: Path) -> int:
    """Open a regular file without following a link at its end, and without waiting on a pipe."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound("source_missing", f"There is no file {source} on the server.", "Check the path.") from None
    except OSError as error:
        raise Invalid(
            "source_path", f"Cannot open {source}: {error.strerror}.", "Name a regular file itself, not a link to it."
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Invalid("source_path", f"{source} is not a regular file.", "Name a regular file.")
    return fd


async def _convert(part: Path, seen: Inspected, disk: Path, progress: Progress) -> None:
    """Rewrite the source as a plain qcow2 beside ``disk``, then put it in place."""
    new = disk.with_name("disk.new")
    argv = ["qemu-img", "convert", "-p", "-W", "-f", seen.format.value, "-O", "qcow2", str(part), str(new)]
    new.unlink(missing_ok=True)
    try:
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        await _run_convert(argv, disk.parent, progress, "converting")
        await anyio.to_thread.run_sync(_sync, new)
        await anyio.to_thread.run_sync(new.replace, disk)
    finally:
        new.unlink(missing_ok=True)


async def _run_convert(argv: list[str], folder: Path, progress: Progress, doing: str) -> None:
    command = limited(argv, address_space=8 * GIB)
    completed = await run(command, timeout_s=_CONVERT_TIMEOUT_S, check=False, on_output=_percent(progress, doing))
    if completed.returncode == 0:
        return
    if is_disk_full(completed.stderr):
        raise no_space("store the image", folder)
    raise failure(argv, completed)


def _percent(progress: Progress, doing: str) -> Callable[[bytes], None]:
    """Read the progress that `qemu-img -p` writes: `    (12.34/100%)`."""

    def on_output(piece: bytes) -> None:
        found = re.findall(rb"\((\d+\.\d+)/100%\)", piece)
        if found:
            progress(float(found[-1]) / 100, f"{doing} the disk")

    return on_output


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _take(built: BuiltImage, folder: Path) -> None:
    """Move the files of a finished build to their places."""
    for source, name in ((built.kernel, "kernel"), (built.initrd, "initrd"), (built.disk, "disk.qcow2")):
        if source is not None:
            # QEMU opens kernel and initrd again, as its own user, through the descriptor it inherits: readable by all
            # inside a folder that only we may enter
            source.chmod(0o600 if name == "disk.qcow2" else 0o444)
            _sync(source)
            source.replace(folder / name)


def _finish(folder: Path, record: _Record) -> StoredImage:
    """Write `image.json`, which makes the image exist, and let go of the source."""
    new = folder / "image.json.new"
    new.write_text(record.model_dump_json())
    _sync(new)
    new.replace(folder / "image.json")
    _sync(folder)
    found = _read_record(folder)
    if found is None:
        raise Internal("image_record", f"The image in {folder} vanished while it was finished.")
    return found


def _read_record(folder: Path) -> StoredImage | None:
    """Return what is stored, or None when the image is not whole yet."""
    disk = folder / "disk.qcow2"
    try:
        record = _Record.model_validate_json((folder / "image.json").read_bytes())
        stored = disk.stat().st_blocks * 512
    except FileNotFoundError:
        return None
    forget_part(folder / "source.part")
    kernel, initrd = folder / "kernel", folder / "initrd"
    boot = None
    if kernel.exists():
        boot = BootFiles(kernel=str(kernel), initrd=str(initrd), arguments=record.arguments)
    return StoredImage(qcow2_virtual_size(disk), stored, record.sha256, record.source_format, boot, record.os)


def _remove(folder: Path) -> None:
    """Remove an image; its record goes first, so that half an image is never taken for one."""
    (folder / "image.json").unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
