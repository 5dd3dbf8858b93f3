"""Fetches a file over HTTP into a file that may already hold its beginning.

What was fetched is never fetched twice: cut off, killed or cancelled, the next call asks for the rest, and the server
confirms by its ETag (RFC 9110 `If-Range`) that it is still the same file. Refuses other schemes, more than a few
redirects, a step from https down to http, and files that would fill the disk.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx2

from colmeia.model.base import MIB, Model
from colmeia.model.errors import Invalid, NotFound, Unavailable
from colmeia.storage.interface import Progress
from colmeia.storage.space import free_bytes, is_disk_full, no_space, reserve_bytes

_MAX_REDIRECTS = 5
_ATTEMPTS = 5  # in a row without a single new byte
_TIMEOUT = httpx2.Timeout(30.0, connect=15.0)


class _Kept(Model):
    """What is remembered beside a part: whose beginning it is. After another boot its tail may be missing."""

    url: str
    validator: str
    boot_id: str


class _Part(NamedTuple):
    """The part on disk: its size, the hash of its bytes, and the validator it may be continued with."""

    size: int
    hash: "hashlib._Hash"
    validator: str


class _TryAgainError(Exception):
    """The network or the server failed in a way that may pass."""


def check_url(url: str) -> None:
    """Raise Invalid (`source_url`) for what is not a plain http or https URL."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
        parts = urlsplit("")
    if not is_good:
        raise Invalid(
            "source_url", "The source is no http or https URL.", "Write https://HOST/PATH, or an absolute path."
        )
    if parts.username is not None or parts.password is not None:
        raise Invalid(
            "source_url", "The URL carries a password, which would be kept and shown.", "Use a URL without one."
        )


async def download(url: str, part: Path, progress: Progress) -> str:
    """Ensure that ``part`` holds all bytes of ``url`` and return their SHA-256 (hexadecimal).

    Keeps ``part`` and a small state file beside it when the network fails or the call is cancelled, so that the next
    call goes on from there; removes both when the disk is full. Raises Invalid (`source_url`, `source_redirects`),
    NotFound (`source_missing`), Unavailable (`download_failed`, `disk_full`). Idempotent.
    """
    check_url(url)
    fruitless, reason, share = 0, "", 0.0

    def note(now: float, message: str) -> None:
        nonlocal share
        share = now
        progress(now, message)

    async with httpx2.AsyncClient(follow_redirects=False, timeout=_TIMEOUT) as client:
        held = await anyio.to_thread.run_sync(_open_part, url, part)
        while fruitless < _ATTEMPTS:
            before = held.size
            try:
                return await _fetch(client, url, part, held, note)
            except _TryAgainError as error:
                reason = str(error)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                await anyio.to_thread.run_sync(forget_part, part)
                raise no_space("store the download", part.parent) from error
            held = await anyio.to_thread.run_sync(_open_part, url, part)
            fruitless = 0 if held.size > before else fruitless + 1
            progress(share, f"the download was cut off ({reason}): going on from {held.size / MIB:.0f} MiB")
            await anyio.sleep(min(0.1 * 2**fruitless, 2.0))
    raise Unavailable(
        "download_failed",
        f"The download from {urlsplit(url).hostname} was cut off: {reason}. {held.size / MIB:.0f} MiB are kept.",
        "Ask again: it goes on from there.",
    )


def forget_part(part: Path) -> None:
    """Remove the part and what is remembered about it. Idempotent."""
    _state_of(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _open_part(url: str, part: Path) -> _Part:
    """Hash what is there if it can be continued; otherwise start from nothing."""
    nothing = _Part(0, hashlib.sha256(), "")
    try:
        kept = _Kept.model_validate_json(_state_of(part).read_bytes())
        if kept.url != url or not kept.validator or kept.boot_id != _boot_id():
            raise ValueError("another file, or another boot of this host")
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return _Part(file.tell(), digest, kept.validator)
    except (OSError, ValueError):
        forget_part(part)
        return nothing


def _begin(url: str, part: Path, validator: str) -> None:
    """Start a part from nothing. The old bytes go before the new state comes."""
    forget_part(part)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    state, new = _state_of(part), part.with_name(f"{part.name}.json.new")
    new.write_text(_Kept(url=url, validator=validator, boot_id=_boot_id()).model_dump_json())
    new.replace(state)


async def _fetch(client: httpx2.AsyncClient, url: str, part: Path, held: _Part, progress: Progress) -> str:
    """Ask for the rest of the file and append it; returns the hash of all of it."""
    headers = {"Accept-Encoding": "identity"}
    if held.size:
        headers |= {"Range": f"bytes={held.size}-", "If-Range": held.validator}
    try:
        response = await _open(client, url, headers)
        try:
            at = _position(response, held)
            if at is None:  # the part was whole already
                return held.hash.hexdigest()
            if at == 0:
                await anyio.to_thread.run_sync(_begin, url, part, _validator(response))
                held = _Part(0, hashlib.sha256(), "")
            total = _total(response, at)
            await anyio.to_thread.run_sync(_check_space, part, total, at)
            return await _append(response, part, held, total, progress)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()
    except httpx2.InvalidURL as error:
        raise Invalid("source_url", f"The URL cannot be read: {error}.", "Check the URL.") from error
    except httpx2.TransportError as error:
        raise _TryAgainError(str(error) or type(error).__name__) from error


async def _open(client: httpx2.AsyncClient, url: str, headers: dict[str, str]) -> httpx2.Response:
    """Send the request, following a few redirects by hand so that none leads where we refuse to go."""
    for _ in range(_MAX_REDIRECTS + 1):
        response = await client.send(client.build_request("GET", url, headers=headers), stream=True)
        if response.next_request is None:
            return response
        await response.aclose()
        target = str(response.next_request.url)
        check_url(target)
        if url.startswith("https:") and not target.startswith("https:"):
            raise Invalid(
                "source_redirects", "The server leads from https to http.", "Use the URL it leads to, if you trust it."
            )
        url = target
    raise Invalid("source_redirects", f"The URL redirects more than {_MAX_REDIRECTS} times.", "Check the URL.")


def _position(response: httpx2.Response, held: _Part) -> int | None:
    """Return from which byte the answer goes on: where we are, 0 for a new beginning, None when nothing is missing."""
    status = response.status_code
    if status == 206 and held.size:
        match = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
        return held.size if match and int(match[1]) == held.size else _refuse_answer(status)
    if status == 416 and held.size:
        whole = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("content-range", ""))
        if whole and int(whole[1]) == held.size:
            return None
        raise Unavailable(
            "download_failed", "The server's file is shorter than before.", "Delete the image and ask again."
        )
    if status == 200:
        return 0
    return _refuse_answer(status)


def _refuse_answer(status: int) -> int:
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgainError(f"the server answered {status}")
    if status in (404, 410):
        raise NotFound("source_missing", f"The server has no such file (it answered {status}).", "Check the URL.")
    raise Unavailable(
        "download_failed", f"The server refused: it answered {status}.", "Check the URL and who may read it."
    )


def _validator(response: httpx2.Response) -> str:
    """Return the strong validator of the answer, or '' when it has none (a weak ETag proves nothing about bytes)."""
    etag: str = response.headers.get("etag", "")
    if etag.startswith('"'):
        return etag
    modified: str = response.headers.get("last-modified", "")
    return modified if not etag else ""


def _total(response: httpx2.Response, at: int) -> int | None:
    length = response.headers.get("content-length", "")
    return at + int(length) if length.isdecimal() else None


def _check_space(part: Path, total: int | None, at: int) -> None:
    missing = (total or at) - at
    if missing + reserve_bytes(part.parent) > free_bytes(part.parent):
        forget_part(part)
        raise no_space("store the download", part.parent, missing)


async def _append(response: httpx2.Response, part: Path, held: _Part, total: int | None, progress: Progress) -> str:
    size, digest = held.size, held.hash
    with part.open("ab", buffering=0) as file:
        async for piece in response.aiter_raw():
            await anyio.to_thread.run_sync(_write, file.fileno(), digest, piece)
            size += len(piece)
            if total is None:
                await anyio.to_thread.run_sync(_check_space, part, None, size)
            share = size / total if total else 0.0
            of = f" of {total / MIB:.0f}" if total else ""
            progress(share, f"downloaded {size / MIB:.0f}{of} MiB")
        await anyio.to_thread.run_sync(os.fsync, file.fileno())
    if total is not None and size < total:
        raise _TryAgainError(f"{total - size} bytes are missing")
    return digest.hexdigest()


def _write(fd: int, digest: "hashlib._Hash", piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]
    digest.update(piece)
