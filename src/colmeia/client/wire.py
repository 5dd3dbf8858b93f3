"""How the sync client's requests travel: over the local socket by the standard library, over TCP by httpx2.

Two ways, because httpx2 with its transport costs 0.15 s of imports (measured, Python 3.11) and a command such as
`colmeia vm list` has 0.25 s for everything. Refuses to retry and to understand answers: that is the client's.
"""

import errno
import http.client
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from colmeia.client.address import Address
from colmeia.client.call import Request
from colmeia.client.errors import ServerUnreachable

if TYPE_CHECKING:
    import ssl

    import httpx2

_CHUNK = 64 * 1024
_START_HINT = "Is the daemon running? Start it with 'colmeia serve', or name another server with --server."


class Reply(Protocol):
    """An answer whose body has not been read. Closing it frees the connection."""

    status: int

    def read(self) -> bytes: ...
    def chunks(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Wire(Protocol):
    """A way to one server. Safe to use from several threads."""

    def send(self, request: Request) -> Reply:
        """Send and return once the status is there. Raises ServerUnreachable."""
        ...

    def close(self) -> None: ...


def open_wire(address: Address) -> Wire:
    """Return the wire that fits the address. Nothing is connected yet."""
    return SocketWire(address) if address.socket else TcpWire(address)


def trusted_context(address: Address) -> "ssl.SSLContext | bool":
    """Return what httpx2 verifies a server with: the named certificate, else what the system trusts."""
    if address.ca_file is None:
        return address.url.startswith("https:")
    import ssl

    try:
        return ssl.create_default_context(cafile=address.ca_file)
    except OSError as error:
        raise ServerUnreachable(str(address), f"COLMEIA_CA {address.ca_file}: {error}", "Name a PEM file.") from error


def explain_socket(address: Address, error: OSError, *, is_sent: bool) -> ServerUnreachable:
    """Say in words why a local socket did not answer, and what helps."""
    where = str(address)
    if isinstance(error, TimeoutError):
        return ServerUnreachable(where, "no answer in time", "Try again.", is_sent=is_sent, is_timeout=True)
    match error.errno:
        case errno.ENOENT:
            return ServerUnreachable(where, "there is no such socket", _START_HINT)
        case errno.ECONNREFUSED:
            return ServerUnreachable(where, "nobody listens on the socket", _START_HINT)
        case errno.EACCES | errno.EPERM:
            return ServerUnreachable(where, "permission denied", "Use sudo, or a token over TCP (COLMEIA_SERVER).")
    return ServerUnreachable(where, str(error) or type(error).__name__, is_sent=is_sent)


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("colmeia", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class SocketReply:
    """An answer over its own connection, which ends with it."""

    def __init__(self, address: Address, connection: _SocketConnection, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self._address = address
        self._connection = connection
        self._response = response

    def read(self) -> bytes:
        try:
            return self._response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _broken(self._address, error) from error

    def chunks(self) -> Iterator[bytes]:
        try:
            while chunk := self._response.read1(_CHUNK):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise _broken(self._address, error) from error

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def _broken(address: Address, error: Exception) -> ServerUnreachable:
    if isinstance(error, OSError):
        return explain_socket(address, error, is_sent=True)
    return ServerUnreachable(str(address), f"the answer broke off ({type(error).__name__})", is_sent=True)


class SocketWire:
    """A connection per request: a local one costs 0.1 ms, and none can have gone stale."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def send(self, request: Request) -> SocketReply:
        connection = _SocketConnection(str(self._address.socket), request.timeout_s)
        is_sent = False
        try:
            connection.connect()
            is_sent = True
            connection.request(request.method, request.target, body=request.body, headers=request.headers)
            return SocketReply(self._address, connection, connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if isinstance(error, OSError):
                raise explain_socket(self._address, error, is_sent=is_sent) from error
            raise _broken(self._address, error) from error

    def close(self) -> None:
        """Nothing is kept open."""


class TcpReply:
    """An answer of httpx2's connection pool."""

    def __init__(self, address: Address, response: "httpx2.Response") -> None:
        self.status = response.status_code
        self._address = address
        self._response = response

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        import httpx2

        try:
            yield from self._response.iter_bytes()
        except httpx2.TransportError as error:
            raise explain_transport(self._address, error) from error

    def close(self) -> None:
        self._response.close()


def explain_transport(address: Address, error: "httpx2.TransportError") -> ServerUnreachable:
    """Turn httpx2's error into ours, keeping whether the request may have arrived."""
    import httpx2

    is_sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    is_timeout = isinstance(error, httpx2.TimeoutException)
    reason = str(error) or type(error).__name__
    hint = _START_HINT if not is_sent else ""
    if "CERTIFICATE" in reason.upper():
        hint = "Name the file with the server's certificate in COLMEIA_CA."
    return ServerUnreachable(str(address), reason, hint, is_sent=is_sent, is_timeout=is_timeout)


class TcpWire:
    """httpx2's pool, with TLS by what the system trusts or by the named certificate."""

    def __init__(self, address: Address) -> None:
        import httpx2

        self._address = address
        self._client = httpx2.Client(base_url=address.url, verify=trusted_context(address))

    def send(self, request: Request) -> TcpReply:
        import httpx2

        built = self._client.build_request(
            request.method,
            request.target,
            content=request.body,
            headers=request.headers,
            timeout=request.timeout_s,
        )
        try:
            return TcpReply(self._address, self._client.send(built, stream=True))
        except httpx2.TransportError as error:
            raise explain_transport(self._address, error) from error

    def close(self) -> None:
        self._client.close()
