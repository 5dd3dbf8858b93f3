"""From the options of `vm create` and `vm set` to the body of the request. Pure, but for files the user names.

Refuses what only this side can know to be wrong (a forward without ports, a private key); the server judges the rest.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colmeia.client.errors import ClientError

_FORWARD = re.compile(r"(?:(\d+(?:\.\d+){3}):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?")
_PUBLIC_KEY = re.compile(r"(ssh-|ecdsa-|sk-)\S+ \S+")


def _wrong(code: str, detail: str, hint: str) -> ClientError:
    return ClientError("invalid", code, detail, hint)


def parse_forward(text: str) -> dict[str, Any]:
    """Read ``[ADDRESS:]HOST_PORT:GUEST_PORT[/udp]``, such as ``2222:22`` or ``0.0.0.0:5353:53/udp``."""
    match = _FORWARD.fullmatch(text)
    if match is None:
        raise _wrong(
            "forward", f"{text!r} is not a forward.", "Write [ADDRESS:]HOST_PORT:GUEST_PORT[/udp], such as 2222:22."
        )
    address, host_port, guest_port, protocol = match.groups()
    forward = {"host_port": int(host_port), "guest_port": int(guest_port), "protocol": protocol or "tcp"}
    return {"host_address": address, **forward} if address else forward


def parse_disk(text: str) -> dict[str, Any]:
    """Read ``NAME=SIZE``, such as ``data=20GiB``."""
    name, equals, size = text.partition("=")
    if not (name and equals and size):
        raise _wrong("disk", f"{text!r} is not a disk.", "Write NAME=SIZE, such as data=20GiB.")
    return {"name": name, "size": size}


def read_ssh_keys(text: str) -> list[str]:
    """Return the public keys of a file, or the key itself when the text is one."""
    if _PUBLIC_KEY.match(text):
        return [text.strip()]
    path = Path(text).expanduser()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(
            "ssh_key", f"Cannot read the ssh key {text!r}: {error}", "Name a .pub file or paste the key."
        ) from error
    if any("PRIVATE KEY" in line for line in lines):
        raise _wrong("ssh_key", f"{path} is a private key: it stays with you.", f"Name the public one: {path}.pub")
    keys = [line.strip() for line in lines if _PUBLIC_KEY.match(line.strip())]
    if not keys:
        raise _wrong("ssh_key", f"{path} holds no public ssh key.", "Name a .pub file or paste the key.")
    return keys


def given(**values: Any) -> dict[str, Any]:
    """Return what was given; what is absent stays the server's to decide."""
    return {key: value for key, value in values.items() if value is not None}


def cloud_init(ssh_keys: Sequence[str], user: str | None, user_data: Path | None) -> dict[str, Any]:
    keys = [key for text in ssh_keys for key in read_ssh_keys(text)]
    text = None if user_data is None else user_data.expanduser().read_text()
    return given(user=user, ssh_keys=keys or None, user_data=text)


def disks(image: str | None, size: str | None, extra: Sequence[str]) -> list[dict[str, Any]]:
    root = given(image=image, size=size)
    return ([{"name": "root", **root}] if root else []) + [parse_disk(text) for text in extra]
