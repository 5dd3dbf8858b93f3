"""What every route shares: who calls, pages, problems, idempotent submission of operations."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Header, Path, Query, Request, Response
from pydantic import Field
from starlette.requests import HTTPConnection

from colmeia.control import identity as who
from colmeia.control.services import Services, now
from colmeia.model.base import Model
from colmeia.model.errors import ColmeiaError, Conflict, NotFound, Unauthenticated
from colmeia.model.identity import DEFAULT_PROJECT, Identity
from colmeia.model.operation import Operation
from colmeia.store import history, links
from colmeia.store.database import Connection

PROBLEM_TYPE = "application/problem+json"
PEER_PREFIX = "unix:"


class ProblemDocument(Model):
    """An error (RFC 9457)."""

    type: str = Field(examples=["urn:colmeia:vm_state"])
    title: str
    status: int
    kind: str = Field(description="What you can do about it: invalid, not_found, conflict, busy, forbidden, …")
    code: str = Field(description="Stable; branch on this.")
    detail: str
    hint: str = Field(description="What to do now.")
    errors: list[dict[str, Any]] | None = Field(default=None, description="For an invalid body: each wrong field.")


_PROBLEM_SCHEMA = {"content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error answers of a route for the OpenAPI document."""
    titles = {
        400: "Malformed request",
        401: "Not authenticated",
        403: "Not permitted",
        404: "Not found",
        409: "Conflict or busy",
        412: "Changed meanwhile",
        422: "Invalid",
        500: "Defect or unknown outcome",
        503: "Unavailable",
    }
    everywhere = (400, 401, 403, 422, 503)
    return {status: {"description": titles[status], **_PROBLEM_SCHEMA} for status in (*everywhere, *statuses)}


def problem(error: ColmeiaError, errors: Sequence[Any] | None = None) -> Response:
    """Render an error."""
    document = ProblemDocument(
        type=f"urn:colmeia:{error.code}",
        title=error.kind.replace("_", " "),
        status=error.status,
        kind=error.kind,
        code=error.code,
        detail=error.message,
        hint=error.hint,
        errors=None if errors is None else list(errors),
    )
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    body = document.model_dump_json(exclude_none=True)
    return Response(body, error.status, media_type=PROBLEM_TYPE, headers=headers)


def services_of(connection: HTTPConnection) -> Services:
    services: Services = connection.app.state.services
    return services


async def caller(connection: HTTPConnection) -> Identity:
    """Return who calls: the peer of the local socket, or the bearer of a token."""
    client = connection.client
    if client is not None and client.host.startswith(PEER_PREFIX):
        return who.identity_of_peer(int(client.host.removeprefix(PEER_PREFIX)), connection.app.state.own_uid)
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated(
            "token_missing", "No token was sent.", "Send 'Authorization: Bearer TOKEN' (COLMEIA_TOKEN)."
        )
    return await who.identity_of_secret(services_of(connection), secret.strip())


def project_of(
    identity: Annotated[Identity, Depends(caller)],
    project: Annotated[
        str | None, Query(pattern=r"^[a-z0-9-]{1,63}$", description="Default: your token's, or `default`.")
    ] = None,
) -> str:
    return who.check_project(identity, project or identity.project or DEFAULT_PROJECT)


TheServices = Annotated[Services, Depends(services_of)]
Caller = Annotated[Identity, Depends(caller)]
InProject = Annotated[str, Depends(project_of)]
NameOrId = Annotated[str, Path(pattern=r"^[a-z0-9-]{1,63}$", description="Name or id.")]
Limit = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[
    str | None, Query(pattern=r"^[a-z0-9-]{1,63}\.[0-9a-f]{16}$", description="`next` of the page before.")
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="The same key does the work once, however often it is sent.",
    ),
]

T = TypeVar("T")


class Page(Model, Generic[T]):
    """One page of a list."""

    items: list[T]
    next: str | None = Field(description="Cursor of the next page; null at the end.")


def page(documents: Sequence[str], cursor: str | None) -> Response:
    """Render documents that are JSON already."""
    tail = "null" if cursor is None else f'"{cursor}"'
    return Response(f'{{"items":[{",".join(documents)}],"next":{tail}}}', media_type="application/json")


def rendered(value: Model, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(value.model_dump_json(), status, media_type="application/json", headers=headers)


async def submitted(
    request: Request, identity: Identity, key: str | None, ask: Callable[[Connection], Awaitable[Operation]]
) -> Response:
    """Have ``ask`` write its operation, once per idempotency key, and answer 202 with it."""
    services = services_of(request)
    digest = hashlib.sha256(
        f"{request.method} {request.url.path}?{request.url.query}\n".encode() + await request.body()
    )
    async with services.database.transaction() as tx:
        known = None if key is None else await links.remembered(tx, identity.name, key)
        if known is not None:
            operation = await _same_answer(tx, known, digest.hexdigest())
        else:
            operation = await ask(tx)
            if key is not None:
                await links.remember(
                    tx, identity.name, key, request_sha256=digest.hexdigest(), operation_id=operation.id, at=now()
                )
    if not operation.state.is_final:
        services.operations.wake(operation)
    return rendered(operation, 202, {"Location": f"/v1/operations/{operation.id}"})


async def _same_answer(tx: Connection, known: tuple[str, str], digest: str) -> Operation:
    request_sha256, operation_id = known
    if request_sha256 != digest:
        raise Conflict(
            "idempotency_key_reused",
            "This Idempotency-Key was used for a different request.",
            "Use a new key for new work.",
        )
    try:
        return await history.get_operation(tx, operation_id, project=None)
    except NotFound as error:
        raise Conflict("idempotency_key_expired", "The operation of this key is gone.", "Use a new key.") from error
