"""Projects, tokens and the caller over HTTP."""

from fastapi import APIRouter, Response

from colmeia.api.edge import Caller, Cursor, Limit, NameOrId, Page, TheServices, page, problems, rendered
from colmeia.control import identity as control
from colmeia.control.identity import require
from colmeia.model.identity import Identity, Project, ProjectCreate, Token, TokenCreate, TokenCreated
from colmeia.store import documents

router = APIRouter(prefix="/v1", responses=problems())


@router.get("/whoami", tags=["user"], response_model=Identity)
async def whoami(identity: Caller) -> Response:
    """Tell who the caller is."""
    return rendered(identity)


@router.get("/projects", tags=["project"], response_model=Page[Project])
async def list_projects(
    services: TheServices, identity: Caller, limit: Limit = 1000, cursor: Cursor = None
) -> Response:
    """List projects."""
    equals = {} if identity.project is None else {"name": identity.project}
    async with services.database.reading() as tx:
        return page(*await documents.projects.page(tx, project=None, equals=equals, after=cursor, limit=limit))


@router.post("/projects", tags=["project"], status_code=201, response_model=Project, responses=problems(409))
async def create_project(services: TheServices, identity: Caller, wish: ProjectCreate) -> Response:
    """Create a project (administrators)."""
    require(identity, write=True, admin=True)
    return rendered(await control.create_project(services, wish), 201)


@router.delete("/projects/{project}", tags=["project"], status_code=204, responses=problems(404, 409))
async def delete_project(services: TheServices, identity: Caller, project: NameOrId) -> Response:
    """Delete an empty project (administrators)."""
    require(identity, write=True, admin=True)
    await control.delete_project(services, project)
    return Response(status_code=204)


@router.get("/tokens", tags=["token"], response_model=Page[Token])
async def list_tokens(services: TheServices, identity: Caller, limit: Limit = 1000, cursor: Cursor = None) -> Response:
    """List tokens, without their secrets (administrators)."""
    require(identity, write=False, admin=True)
    async with services.database.reading() as tx:
        return page(*await documents.tokens.page(tx, project=None, equals={}, after=cursor, limit=limit))


@router.post("/tokens", tags=["token"], status_code=201, response_model=TokenCreated, responses=problems(404, 409))
async def create_token(services: TheServices, identity: Caller, wish: TokenCreate) -> Response:
    """Create a token; its secret is shown this once (administrators)."""
    require(identity, write=True, admin=True)
    return rendered(await control.create_token(services, wish), 201)


@router.delete("/tokens/{token}", tags=["token"], status_code=204, responses=problems(404))
async def delete_token(services: TheServices, identity: Caller, token: NameOrId) -> Response:
    """Revoke a token (administrators)."""
    require(identity, write=True, admin=True)
    await control.delete_token(services, token)
    return Response(status_code=204)
