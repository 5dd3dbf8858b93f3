"""`colmeia image`: images virtual machines start from."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cyclopts import App

from colmeia.cli.options import CHANGING, COMMON, Changing, Common
from colmeia.cli.output import age, note, show
from colmeia.cli.progress import finish
from colmeia.cli.vm_spec import given
from colmeia.client import ClientError

app = App(name="image", help="Images virtual machines start from.", help_format="plaintext")

COLUMNS: dict[str, Callable[[Any], object]] = {
    "NAME": lambda image: image["name"],
    "STATE": lambda image: image["state"],
    "OS": lambda image: image["os"],
    "SIZE": lambda image: image["virtual_size"],
    "STORED": lambda image: image["stored_size"],
    "SOURCE": lambda image: image["source"],
    "AGE": lambda image: age(image["created_at"]),
}


def name_of(source: str) -> str:
    """Make an image name of a file name or URL: ``/srv/Debian_12.qcow2`` gives debian-12. Raises ClientError."""
    path = urlsplit(source).path if "://" in source else source
    stem = re.sub(r"\.(qcow2|img|raw|vmdk|vhdx|vdi|vhd)$", "", path.rstrip("/").rsplit("/", 1)[-1].lower())
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:63].strip("-")
    if not name:
        raise ClientError("invalid", "image_name", f"{source!r} gives no name for the image.", "Give one with --name.")
    return name


@app.command(name="import")
def import_(
    source: str,
    /,
    *,
    name: str | None = None,
    format: Literal["qcow2", "raw", "vmdk", "vhdx", "vdi", "vpc"] | None = None,  # noqa: A002 - the option's name
    sha256: str | None = None,
    os: str | None = None,
    common: Changing = CHANGING,
) -> None:
    """Import an image from a file on the server or from a URL.

    For example:

        colmeia image import /srv/debian-12.qcow2
        colmeia image import https://example.org/debian-12.qcow2 --name debian-12 --sha256 SUM
        colmeia image import disk.img --format raw

    Parameters
    ----------
    source
        A file on the server (a relative path is taken from here), or an http(s) URL.
    name
        Its name (default: from the file's).
    format
        Found by looking when absent; a raw file needs it said.
    sha256
        What the source must have; anything else is refused.
    os
        A word on what is in it, such as debian/12.
    """
    place = source if "://" in source else str(Path(source).expanduser().absolute())
    body = {"name": name or name_of(source), "source": place, **given(format=format, sha256=sha256, os=os)}
    with common.connect() as client:
        finish(client, client.images.import_(body), common, "Image", client.images.show)


@app.command
def build(recipe: str, /, *, name: str | None = None, common: Changing = CHANGING) -> None:
    """Build an image from the distribution's packages.

    For example:

        colmeia image build tiny            10 MB, boots in seconds, for trying out
        colmeia image build debian/12       cloud kernel, cloud-init, guest agent, sshd

    Parameters
    ----------
    recipe
        tiny, or debian/12.
    name
        Its name (default: tiny, debian-12).
    """
    with common.connect() as client:
        chosen = name or name_of(recipe.replace("/", "-"))
        finish(client, client.images.build(chosen, recipe), common, "Image", client.images.show)


@app.command(name="list")
def list_(*, limit: int | None = None, common: Common = COMMON) -> None:
    """List the images."""
    with common.connect() as client:
        show(client.images.list(limit=limit), common.output, COLUMNS)


@app.command(name="show")
def show_(name: str, /, *, common: Common = COMMON) -> None:
    """Show one image."""
    with common.connect() as client:
        show(client.images.show(name), common.output)


@app.command
def delete(name: str, /, *, common: Changing = CHANGING) -> None:
    """Delete an image. One that virtual machines stand on is kept."""
    with common.connect() as client:
        finish(client, client.images.delete(name), common, "Image", client.images.show)


@app.command
def export(
    name: str,
    file: Path,
    /,
    *,
    format: Literal["qcow2", "raw"] = "qcow2",  # noqa: A002 - the option's name
    common: Common = COMMON,
) -> None:
    """Save an image as a file; - writes it to the output. A file that exists is replaced once the copy is whole."""
    with common.connect() as client:
        if str(file) == "-":
            client.images.export(name, sys.stdout.buffer, image_format=format)
            return
        part = file.with_name(f".{file.name}.part")
        try:
            with part.open("wb") as sink:
                written = client.images.export(name, sink, image_format=format)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        note(f"{written} bytes in {file}")
