"""Who calls: projects, tokens and the identity a request carries."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from colmeia.model.base import Id, Model, Name

DEFAULT_PROJECT = "default"


class Role(StrEnum):
    ADMIN = "admin"  # everything, in every project
    MEMBER = "member"  # everything inside one project
    VIEWER = "viewer"  # may look at one project


class Identity(Model):
    """The authenticated caller."""

    name: str
    role: Role
    project: str | None = Field(default=None, description="The only project it may touch; None: all (admin).")


class Project(Model):
    id: Id
    name: Name
    created_at: datetime


class ProjectCreate(Model):
    name: Name


class Token(Model):
    """A bearer token, without its secret."""

    id: Id
    name: Name
    role: Role
    project: str | None
    created_at: datetime


class TokenCreate(Model):
    name: Name
    role: Role = Role.MEMBER
    project: str | None = Field(default=DEFAULT_PROJECT, description="Ignored for the role admin.")


class TokenCreated(Token):
    secret: str = Field(description="Shown this once; only its hash is kept.")
