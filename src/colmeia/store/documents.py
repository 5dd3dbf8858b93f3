"""Nouns in the database: a model in, a model out.

Every call takes an open transaction, so that a change, the operation it asks for and the event that tells of it are
committed together or not at all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Table, and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from colmeia.model.base import Model
from colmeia.model.errors import Conflict, NotFound
from colmeia.model.identity import Project, Token
from colmeia.model.image import Image
from colmeia.model.vm import Vm
from colmeia.store import tables
from colmeia.store.database import Connection

M = TypeVar("M", bound=Model)


class Documents(Generic[M]):
    """One noun's table: get, list, insert, replace and remove whole models."""

    def __init__(self, noun: str, table: Table, model: type[M], columns: Callable[[M], Mapping[str, Any]]) -> None:
        self.noun = noun
        self.table = table
        self._model = model
        self._columns = columns
        self._in_project = "project" in table.c

    async def get(self, tx: Connection, name_or_id: str, *, project: str | None = None) -> M:
        """Return the object with this id, or else with this name in ``project``. Raises NotFound.

        ``project`` None searches all projects by id only where names are per project.
        """
        c = self.table.c
        is_it: ColumnElement[bool] = c.id == name_or_id
        if project is not None or not self._in_project:
            is_it = is_it | (c.name == name_or_id)
        query = select(c.document).where(is_it).order_by((c.id == name_or_id).desc()).limit(1)
        if self._in_project and project is not None:
            query = query.where(c.project == project)
        document = await tx.scalar(query)
        if document is None:
            place = f" in project {project}" if self._in_project and project else ""
            raise NotFound(
                f"{self.noun.replace(' ', '_')}_not_found",
                f"There is no {self.noun} {name_or_id[:64]!r}{place}.",
                f"See what there is: colmeia {self.noun} list.",
            )
        return self._model.model_validate_json(document)

    async def find(self, tx: Connection, object_id: str) -> M | None:
        """Return the object with this id, or None."""
        document = await tx.scalar(select(self.table.c.document).where(self.table.c.id == object_id))
        return None if document is None else self._model.model_validate_json(document)

    async def all(self, tx: Connection) -> list[M]:
        rows = (await tx.scalars(select(self.table.c.document).order_by(self.table.c.id))).all()
        return [self._model.model_validate_json(row) for row in rows]

    async def count(self, tx: Connection, *, project: str) -> int:
        """Return how many objects a project has."""
        query = select(func.count()).where(self.table.c.project == project)
        return (await tx.scalar(query)) or 0

    async def page(
        self, tx: Connection, *, project: str | None, equals: Mapping[str, str], after: str | None, limit: int
    ) -> tuple[Sequence[str], str | None]:
        """Return up to ``limit`` documents as JSON text, ordered by name, and the cursor of the next page or None.

        The cursor is the (name, id) of the last object shown: a page never skips or repeats one that stays.
        """
        c = self.table.c
        conditions: list[ColumnElement[bool]] = [c[key] == value for key, value in equals.items()]
        if project is not None and self._in_project:
            conditions.append(c.project == project)
        if after is not None:
            name, _, last_id = after.rpartition(".")
            conditions.append((c.name > name) | ((c.name == name) & (c.id > last_id)))
        query = select(c.name, c.id, c.document).where(and_(True, *conditions)).order_by(c.name, c.id).limit(limit + 1)
        rows = (await tx.execute(query)).all()
        more = len(rows) > limit
        rows = rows[:limit]
        return [row.document for row in rows], f"{rows[-1].name}.{rows[-1].id}" if more else None

    async def insert(self, tx: Connection, value: M, **extra: Any) -> None:
        """Insert a new object. Raises Conflict (`name_taken`)."""
        try:
            await tx.execute(insert(self.table).values(**self._row(value), **extra))
        except IntegrityError as error:
            name = getattr(value, "name", "")
            raise Conflict(
                "name_taken",
                f"There is already a {self.noun} named {name!r}.",
                "Choose another name, or delete the old one.",
            ) from error

    async def replace(self, tx: Connection, value: M) -> None:
        """Write an object that exists."""
        row = self._row(value)
        await tx.execute(update(self.table).where(self.table.c.id == row["id"]).values(**row))

    async def remove(self, tx: Connection, object_id: str) -> None:
        await tx.execute(delete(self.table).where(self.table.c.id == object_id))

    def _row(self, value: M) -> dict[str, Any]:
        return {**self._columns(value), "document": value.model_dump_json()}


projects = Documents("project", tables.projects, Project, lambda p: {"id": p.id, "name": p.name})
tokens = Documents("token", tables.tokens, Token, lambda t: {"id": t.id, "name": t.name})
images = Documents(
    "image", tables.images, Image, lambda i: {"id": i.id, "project": i.project, "name": i.name, "state": i.state.value}
)
vms = Documents(
    "vm",
    tables.vms,
    Vm,
    lambda v: {"id": v.id, "project": v.project, "name": v.name, "state": v.state.value, "uid": v.uid},
)
