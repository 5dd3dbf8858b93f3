"""The Python SDK: Colmeia over HTTP, for programs. Knows the REST contract and nothing of the rest of the house.

    from colmeia.client import Client

    with Client() as colmeia:
        operation = colmeia.vms.create({"name": "web1", "spec": {"cpus": 2, "memory": "1GiB"}, "start": True})
        colmeia.operations.wait(operation)
        print(colmeia.vms.show("web1")["state"])

`AsyncClient` is the same with ``await``; the consoles are only there. Objects are the JSON of the API, described by the
typed dictionaries of `colmeia.client.shapes`. Refuses to guess: what the server says is handed on, errors as
`ApiError`.
"""

from typing import TYPE_CHECKING, Any

from colmeia.client.address import Address, find_address
from colmeia.client.errors import ApiError, ClientError, OperationFailed, ServerUnreachable, WaitTimeout
from colmeia.client.sync import Client

if TYPE_CHECKING:
    from colmeia.client.aio import AsyncClient

__all__ = [
    "Address",
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "OperationFailed",
    "ServerUnreachable",
    "WaitTimeout",
    "find_address",
]


def __getattr__(name: str) -> Any:
    """Load `AsyncClient` at its first use: it needs httpx2, which costs 0.15 s that a short command does not have."""
    if name == "AsyncClient":
        from colmeia.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
