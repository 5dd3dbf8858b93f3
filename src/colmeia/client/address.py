"""Where the server is: the local socket, or a URL with a token and a certificate to trust. Reads no files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from colmeia.client.errors import ClientError


@dataclass(frozen=True, slots=True)
class Address:
    """One server. ``socket`` is a Unix socket's path, and then ``url`` only fills the Host header."""

    url: str
    socket: str | None = None
    token: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    def __str__(self) -> str:
        return self.socket or self.url


def default_socket(*, is_root: bool, environ: Mapping[str, str]) -> str:
    """Return the path where a daemon of this user listens: what the daemon's own settings say by default."""
    if is_root:
        return "/run/colmeia/api.sock"
    state = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME', '')}/.local/state"
    return f"{environ.get('XDG_RUNTIME_DIR') or f'{state}/colmeia/run'}/colmeia/api.sock"


def find_address(
    server: str | None = None, *, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> Address:
    """Return the address from ``server``, else ``COLMEIA_SERVER``, else the local socket.

    Takes ``https://host:port``, ``http://host:port``, ``unix:///path`` or a plain path. The token comes from
    ``COLMEIA_TOKEN`` and is never sent over a socket, where the kernel says who calls. ``COLMEIA_CA`` names a file with
    the certificate to trust. Raises ClientError (kind ``invalid``) for anything else.
    """
    text = server or environ.get("COLMEIA_SERVER") or ""
    if not text:
        return Address("http://colmeia", default_socket(is_root=os.getuid() == 0, environ=environ))
    if text.startswith("/"):
        return Address("http://colmeia", text)
    parts = urlsplit(text)
    if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
        return Address("http://colmeia", parts.path)
    if parts.scheme in ("http", "https") and parts.hostname:
        url = text.rstrip("/")
        return Address(url, None, token or environ.get("COLMEIA_TOKEN"), environ.get("COLMEIA_CA"))
    raise ClientError(
        "invalid",
        "server_address",
        f"{text!r} is not the address of a server.",
        "Write https://HOST:PORT, http://HOST:PORT or unix:///PATH.",
    )
