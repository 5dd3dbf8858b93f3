"""Projects, tokens and what a caller may do."""

import hashlib
import secrets

from colmeia.control.services import Services, now
from colmeia.model.base import new_id
from colmeia.model.errors import Conflict, Forbidden, NotFound, Unauthenticated
from colmeia.model.identity import (
    DEFAULT_PROJECT,
    Identity,
    Project,
    ProjectCreate,
    Role,
    Token,
    TokenCreate,
    TokenCreated,
)
from colmeia.store import documents, links

TOKEN_PREFIX = "colmeia_"  # noqa: S105  (lets secret scanners recognise a leaked token)


async def ensure_default_project(services: Services) -> None:
    async with services.database.transaction() as tx:
        try:
            await documents.projects.get(tx, DEFAULT_PROJECT)
        except NotFound:
            await documents.projects.insert(tx, Project(id=new_id(), name=DEFAULT_PROJECT, created_at=now()))


async def create_project(services: Services, wish: ProjectCreate) -> Project:
    project = Project(id=new_id(), name=wish.name, created_at=now())
    async with services.database.transaction() as tx:
        await documents.projects.insert(tx, project)
    return project


async def delete_project(services: Services, name_or_id: str) -> None:
    """Raises Conflict while the project is the default one or holds anything."""
    async with services.database.transaction() as tx:
        project = await documents.projects.get(tx, name_or_id)
        if project.name == DEFAULT_PROJECT:
            raise Conflict("default_project", "The default project cannot be deleted.", "Delete what is in it instead.")
        for nouns in (documents.vms, documents.images):
            count = await nouns.count(tx, project=project.name)
            if count:
                raise Conflict(
                    "project_not_empty",
                    f"Project {project.name} still holds {count} {nouns.table.name}.",
                    "Delete them first.",
                )
        await documents.projects.remove(tx, project.id)


async def create_token(services: Services, wish: TokenCreate) -> TokenCreated:
    """Return the token with its secret: 256 random bits, of which only the SHA-256 is kept."""
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    project = None if wish.role is Role.ADMIN else wish.project or DEFAULT_PROJECT
    token = Token(id=new_id(), name=wish.name, role=wish.role, project=project, created_at=now())
    async with services.database.transaction() as tx:
        if project is not None:
            await documents.projects.get(tx, project)
        await documents.tokens.insert(tx, token, secret_sha256=_digest(secret))
    return TokenCreated(**token.model_dump(), secret=secret)


async def delete_token(services: Services, name_or_id: str) -> None:
    async with services.database.transaction() as tx:
        token = await documents.tokens.get(tx, name_or_id)
        await documents.tokens.remove(tx, token.id)


async def identity_of_secret(services: Services, secret: str) -> Identity:
    """Raises Unauthenticated for a token nobody knows (or that was deleted)."""
    async with services.database.reading() as tx:
        token = await links.token_by_secret(tx, _digest(secret))
    if token is None:
        raise Unauthenticated("token_unknown", "The token is not known here.", "Make one: colmeia token create NAME.")
    return Identity(name=f"token:{token.name}", role=token.role, project=token.project)


def identity_of_peer(uid: int, own_uid: int) -> Identity:
    """Return who is at the other end of the local socket: root and the daemon's own user are admin."""
    if uid in (0, own_uid):
        return Identity(name="root" if uid == 0 else f"uid:{uid}", role=Role.ADMIN)
    raise Forbidden(
        "peer_not_allowed", f"User id {uid} may not use the local socket.", "Use sudo, or a token over TCP."
    )


def check_project(identity: Identity, project: str) -> str:
    """Return the project when the caller may touch it. Raises Forbidden."""
    if identity.project is not None and project != identity.project:
        raise Forbidden(
            "other_project", f"{identity.name} belongs to project {identity.project}, not {project}.", "Use --project."
        )
    return project


def require(identity: Identity, *, write: bool, admin: bool = False) -> None:
    """Raise Forbidden when the caller's role does not reach."""
    if admin and identity.role is not Role.ADMIN:
        raise Forbidden("admin_only", f"{identity.name} is not an administrator.", "Ask one of them.")
    if write and identity.role is Role.VIEWER:
        raise Forbidden("read_only", f"{identity.name} may only look.", "Use a token with the role member.")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
