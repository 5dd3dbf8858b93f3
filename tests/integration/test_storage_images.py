"""Images: fetched, checked, rewritten, exported, deleted; cut at every point and continued."""

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.abc
import pytest

from colmeia.model.base import MIB
from colmeia.model.errors import Invalid, NotFound, Unavailable
from colmeia.model.image import ImageFormat
from colmeia.storage.images import ImageStore

pytestmark = pytest.mark.anyio

ID = "00112233445566aa"
CONTENT = os.urandom(3 * MIB) + bytes(2 * MIB) + os.urandom(3 * MIB)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", tmp_path / "cache")


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("source")
    (folder / "disk.raw").write_bytes(CONTENT)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "disk.raw", folder / "disk.qcow2"], check=True
    )
    return (folder / "disk.qcow2").read_bytes()


def ignore(share: float, message: str) -> None:
    assert 0 <= share <= 1


def files(store_folder: Path) -> list[str]:
    return sorted(path.name for path in store_folder.glob(f"{ID}/*"))


def content(store: ImageStore, folder: Path) -> bytes:
    out = folder / "read.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", store.block_source(ID).path, out], check=True)
    return out.read_bytes()


class Server:
    """A web server that speaks just enough HTTP/1.1 and can be told to misbehave."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.etag = '"one"'
        self.cut_after: list[int] = []  # bytes of body after which each next connection is cut
        self.hang_after: int | None = None
        self.status = 200
        self.location = ""
        self.requests: list[dict[str, str]] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/disk.img"

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Server"]:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._handle)
            yield self
            tasks.cancel_scope.cancel()

    async def _handle(self, stream: anyio.abc.SocketStream) -> None:
        async with stream:
            with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                await self._answer(stream)

    async def _answer(self, stream: anyio.abc.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive()
        lines = data.decode().split("\r\n")[1:]
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines if line)}
        self.requests.append(headers)
        first, status = 0, self.status
        if status == 200 and "range" in headers and headers.get("if-range") == self.etag:
            first, status = int(headers["range"].removeprefix("bytes=").removesuffix("-")), 206
        if first >= len(self.body) and status == 206:
            await stream.send(
                f"HTTP/1.1 416 No\r\nContent-Range: bytes */{len(self.body)}\r\nContent-Length: 0\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            return
        head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(self.body) - first}", "Connection: close"]
        head += [f"ETag: {self.etag}"] if self.etag else []
        head += [f"Location: {self.location}"] if self.location else []
        head += [f"Content-Range: bytes {first}-{len(self.body) - 1}/{len(self.body)}"] if status == 206 else []
        await stream.send("\r\n".join([*head, "", ""]).encode())
        last = len(self.body)
        if self.cut_after:
            last = min(last, first + self.cut_after.pop(0))
        if self.hang_after is not None:
            await stream.send(self.body[first : self.hang_after])
            await anyio.sleep_forever()
        await stream.send(self.body[first:last])


async def test_a_url_is_imported_hashed_and_rewritten(store: ImageStore, tmp_path: Path, qcow2: bytes) -> None:
    digest = hashlib.sha256(qcow2).hexdigest()
    async with Server(qcow2).serve() as server:
        found = await store.import_image(ID, server.url, format=None, sha256=digest.upper(), progress=ignore)
        again = await store.import_image(ID, server.url, format=None, sha256=digest, progress=ignore)
    assert len(server.requests) == 1
    assert found == again
    assert (found.sha256, found.virtual_size, found.source_format) == (digest, 8 * MIB, "qcow2")
    assert 6 * MIB <= found.stored_size < 7 * MIB
    assert content(store, tmp_path) == CONTENT
    assert files(tmp_path / "images") == ["disk.qcow2", "image.json"]
    assert store.block_source(ID).read_only
    assert store.boot_files(ID) is None


@pytest.mark.parametrize("kind", ["raw", "vmdk", "vdi", "vhdx", "vpc"])
async def test_a_file_of_the_host_is_imported(store: ImageStore, tmp_path: Path, kind: str) -> None:
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    source = tmp_path / f"disk.{kind}"
    if kind != "raw":
        argv = ["qemu-img", "convert", "-f", "raw", "-O", kind, tmp_path / "disk.raw", source]
        subprocess.run([*argv, *(["-o", "force_size=on"] if kind == "vpc" else [])], check=True)
    wanted = ImageFormat(kind) if kind == "raw" else None
    found = await store.import_image(ID, str(source), format=wanted, sha256=None, progress=ignore)
    assert found.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert content(store, tmp_path) == CONTENT


async def test_a_cut_download_goes_on_where_it_stopped(store: ImageStore, tmp_path: Path, qcow2: bytes) -> None:
    server = Server(qcow2)
    server.cut_after = [1_000_000, 1, 2_000_000]
    async with server.serve():
        await store.import_image(ID, server.url, format=None, sha256=hashlib.sha256(qcow2).hexdigest(), progress=ignore)
    assert [request.get("range") for request in server.requests] == [
        None, "bytes=1000000-", "bytes=1000001-", "bytes=3000001-",
    ]  # fmt: skip
    assert content(store, tmp_path) == CONTENT


async def test_a_file_that_changed_is_fetched_anew(store: ImageStore, tmp_path: Path, qcow2: bytes) -> None:
    server = Server(bytes(len(qcow2)))
    server.cut_after = [500_000] + [0] * 5
    async with server.serve():
        with pytest.raises(Unavailable) as caught:
            await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
        assert caught.value.code == "download_failed"
        assert files(tmp_path / "images") == ["source.part", "source.part.json"]
        server.body, server.etag = qcow2, '"two"'
        found = await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
    assert found.sha256 == hashlib.sha256(qcow2).hexdigest()


async def test_a_server_without_etag_is_asked_for_everything_again(store: ImageStore, qcow2: bytes) -> None:
    server = Server(qcow2)
    server.etag, server.cut_after = "", [500_000]
    async with server.serve():
        found = await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
    assert [request.get("range") for request in server.requests] == [None, None]
    assert found.sha256 == hashlib.sha256(qcow2).hexdigest()


async def test_a_daemon_killed_while_it_fetches_goes_on_after_its_restart(
    store: ImageStore, tmp_path: Path, qcow2: bytes
) -> None:
    server = Server(qcow2)
    server.hang_after = 2_000_000
    async with server.serve():
        code = (
            "import anyio; from pathlib import Path; from colmeia.storage.images import ImageStore\n"
            f"store = ImageStore(Path({str(tmp_path / 'images')!r}), Path({str(tmp_path / 'cache')!r}))\n"
            "async def main():\n"
            f"    await store.import_image({ID!r}, {server.url!r}, format=None, sha256=None,"
            " progress=lambda share, message: None)\n"
            "anyio.run(main)\n"
        )
        daemon = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"})
        part = tmp_path / "images" / ID / "source.part"
        try:
            with anyio.fail_after(30):
                while not part.exists() or part.stat().st_size < 2_000_000:
                    await anyio.sleep(0.01)
        finally:
            daemon.kill()
            daemon.wait()
        server.hang_after = None
        found = await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
    assert [request.get("range") for request in server.requests] == [None, "bytes=2000000-"]
    assert found.sha256 == hashlib.sha256(qcow2).hexdigest()


async def test_a_crash_after_the_download_does_not_fetch_again(store: ImageStore, tmp_path: Path, qcow2: bytes) -> None:
    async with Server(qcow2).serve() as server:
        stages: list[str] = []

        def stop_at_conversion(share: float, message: str) -> None:
            stages.append(message)
            if message.startswith("looking"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            await store.import_image(ID, server.url, format=None, sha256=None, progress=stop_at_conversion)
        await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
    assert [request.get("range") for request in server.requests] == [None, f"bytes={len(qcow2)}-"]
    assert content(store, tmp_path) == CONTENT


async def test_a_wrong_checksum_is_refused_and_nothing_stays(store: ImageStore, tmp_path: Path, qcow2: bytes) -> None:
    async with Server(qcow2).serve() as server:
        with pytest.raises(Invalid) as caught:
            await store.import_image(ID, server.url, format=None, sha256="0" * 64, progress=ignore)
    assert caught.value.code == "checksum_mismatch"
    assert files(tmp_path / "images") == []


async def test_a_backing_file_in_a_source_is_refused_and_nothing_stays(store: ImageStore, tmp_path: Path) -> None:
    source = tmp_path / "evil.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", source, "8M"], check=True
    )
    with pytest.raises(Invalid) as caught:
        await store.import_image(ID, str(source), format=None, sha256=None, progress=ignore)
    assert caught.value.code == "image_backing_file"
    assert files(tmp_path / "images") == []


@pytest.mark.parametrize("source", ["disk.img", "ftp://h/x", "http://", "http://user:secret@h/x", "file:///etc/shadow"])
async def test_a_source_that_is_none_is_refused(store: ImageStore, source: str) -> None:
    with pytest.raises(Invalid) as caught:
        await store.import_image(ID, source, format=None, sha256=None, progress=ignore)
    assert caught.value.code in ("source_url", "source_path")
    assert "secret" not in str(caught.value)


async def test_only_regular_files_are_read(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(Invalid) as caught:
            await store.import_image(ID, f"{tmp_path}/{name}", format=ImageFormat.RAW, sha256=None, progress=ignore)
        assert caught.value.code == "source_path"
    with pytest.raises(NotFound):
        await store.import_image(ID, f"{tmp_path}/none", format=ImageFormat.RAW, sha256=None, progress=ignore)


@pytest.mark.parametrize(
    ("status", "location", "code"),
    [
        (404, "", "source_missing"),
        (403, "", "download_failed"),
        (503, "", "download_failed"),
        (302, "/loop", "source_redirects"),
        (302, "file:///etc/shadow", "source_url"),
    ],
)
async def test_a_server_that_refuses_is_named(store: ImageStore, status: int, location: str, code: str) -> None:
    server = Server(b"")
    server.status, server.location = status, location
    async with server.serve():
        with pytest.raises((NotFound, Unavailable, Invalid)) as caught:
            await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
    assert caught.value.code == code


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_disk_too_small_for_the_download_is_named_before_it_starts(small_disk: Path, tmp_path: Path) -> None:
    store = ImageStore(small_disk, tmp_path / "cache")
    async with Server(bytes(20 * MIB)).serve() as server:
        with pytest.raises(Unavailable) as caught:
            await store.import_image(ID, server.url, format=ImageFormat.RAW, sha256=None, progress=ignore)
    assert caught.value.code == "disk_full"
    assert files(small_disk) == []


async def test_a_disk_that_fills_up_while_converting_leaves_nothing(
    small_disk: Path, tmp_path: Path, qcow2: bytes
) -> None:
    store = ImageStore(small_disk, tmp_path / "cache")
    async with Server(qcow2).serve() as server:
        with pytest.raises(Unavailable) as caught:
            await store.import_image(ID, server.url, format=None, sha256=None, progress=ignore)
    assert caught.value.code == "disk_full"
    assert files(small_disk) == []


@pytest.mark.parametrize("kind", ["qcow2", "raw", "vmdk"])
async def test_an_export_can_be_imported_again(store: ImageStore, tmp_path: Path, qcow2: bytes, kind: str) -> None:
    (tmp_path / "disk.qcow2").write_bytes(qcow2)
    await store.import_image(ID, str(tmp_path / "disk.qcow2"), format=None, sha256=None, progress=ignore)
    exported = tmp_path / "exported"
    exported.write_bytes(b"".join([piece async for piece in store.export(ID, ImageFormat(kind))]))
    await store.delete(ID)
    await store.import_image(ID, str(exported), format=ImageFormat(kind), sha256=None, progress=ignore)
    assert content(store, tmp_path) == CONTENT
    assert list((tmp_path / "cache").glob("*")) == []


async def test_delete_may_be_repeated(store: ImageStore, tmp_path: Path, qcow2: bytes) -> None:
    (tmp_path / "disk.qcow2").write_bytes(qcow2)
    await store.import_image(ID, str(tmp_path / "disk.qcow2"), format=None, sha256=None, progress=ignore)
    for _ in range(2):
        await store.delete(ID)
    assert list((tmp_path / "images").iterdir()) == []
    with pytest.raises(NotFound):
        store.block_source(ID)


async def test_an_unknown_recipe_is_refused(store: ImageStore) -> None:
    with pytest.raises(Invalid) as caught:
        await store.build(ID, "debian/2", progress=ignore)
    assert caught.value.code == "unknown_recipe"
