"""Images over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from colmeia.api.edge import (
    Caller,
    Cursor,
    IdempotencyKey,
    InProject,
    Limit,
    NameOrId,
    Page,
    TheServices,
    page,
    problems,
    rendered,
    submitted,
)
from colmeia.control import image as control
from colmeia.control.identity import require
from colmeia.model.errors import Conflict
from colmeia.model.image import Image, ImageBuild, ImageFormat, ImageImport, ImageState
from colmeia.model.operation import Operation
from colmeia.store import documents
from colmeia.store.database import Connection

router = APIRouter(prefix="/v1/images", tags=["image"], responses=problems(404))


@router.get("", response_model=Page[Image])
async def list_images(
    services: TheServices,
    project: InProject,
    limit: Limit = 1000,
    cursor: Cursor = None,
    state: ImageState | None = None,
) -> Response:
    """List images by name."""
    equals = {} if state is None else {"state": state.value}
    async with services.database.reading() as tx:
        return page(*await documents.images.page(tx, project=project, equals=equals, after=cursor, limit=limit))


@router.post("", status_code=202, response_model=Operation, responses=problems(404, 409))
async def import_image(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    wish: ImageImport,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Import an image. A file on the server may only be named by an administrator; anyone may name a URL."""
    require(identity, write=True, admin="://" not in wish.source)

    async def ask(tx: Connection) -> Operation:
        return await control.request_import(services, tx, identity, project, wish)

    return await submitted(request, identity, idempotency_key, ask)


@router.post("/build", status_code=202, response_model=Operation, responses=problems(404, 409))
async def build_image(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    wish: ImageBuild,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Build an image from the distribution's packages: `tiny` or `debian/12`."""
    require(identity, write=True)

    async def ask(tx: Connection) -> Operation:
        return await control.request_build(services, tx, identity, project, wish)

    return await submitted(request, identity, idempotency_key, ask)


@router.get("/{image}", response_model=Image)
async def show_image(services: TheServices, project: InProject, image: NameOrId) -> Response:
    """Show one image."""
    async with services.database.reading() as tx:
        return rendered(await documents.images.get(tx, image, project=project))


@router.delete("/{image}", status_code=202, response_model=Operation, responses=problems(404, 409))
async def delete_image(
    request: Request,
    services: TheServices,
    identity: Caller,
    project: InProject,
    image: NameOrId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Delete an image that no VM is a child of."""
    require(identity, write=True)

    async def ask(tx: Connection) -> Operation:
        return await control.request_delete(services, tx, identity, project, image)

    return await submitted(request, identity, idempotency_key, ask)


@router.get(
    "/{image}/export",
    response_class=Response,
    responses={
        200: {
            "description": "The disk.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems(404, 409),
    },
)
async def export_image(
    services: TheServices,
    project: InProject,
    image: NameOrId,
    format: Annotated[ImageFormat, Query()] = ImageFormat.QCOW2,  # noqa: A002
) -> Response:
    """Download the disk of an image."""
    async with services.database.reading() as tx:
        found = await documents.images.get(tx, image, project=project)
    if found.state is not ImageState.READY:
        raise Conflict("image_not_ready", f"Image {found.name} is {found.state.value}.", "Wait until it is ready.")
    name = f"{found.name}.{format.value}"
    return StreamingResponse(
        services.images.export(found.id, format),
        media_type="application/octet-stream",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )
