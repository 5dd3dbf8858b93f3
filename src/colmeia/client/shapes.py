"""The JSON of the API as typed dictionaries: names for a type checker, nothing at run time.

Only what callers commonly read is spelled out; the server's ``/openapi.json`` is the full description.
"""

from typing import Any, NotRequired, TypedDict

Json = dict[str, Any]


class Vm(TypedDict):
    id: str
    project: str
    name: str
    revision: int
    spec: Json
    state: str
    desired: str
    runtime: Json
    died: Json | None
    created_at: str


class Image(TypedDict):
    id: str
    project: str
    name: str
    state: str
    source: str
    os: str
    virtual_size: str
    stored_size: str
    sha256: str
    created_at: str


class Operation(TypedDict):
    id: str
    project: str
    kind: str
    target_kind: str
    target_id: str
    target_name: str
    state: str
    progress: float
    message: str
    error: Json | None
    requested_by: str
    created_at: str
    started_at: str | None
    finished_at: str | None


class Event(TypedDict):
    seq: int
    at: str
    project: str
    kind: str
    object_kind: str
    object_id: str
    object_name: str
    data: Json


class Project(TypedDict):
    id: str
    name: str
    created_at: str


class Token(TypedDict):
    id: str
    name: str
    role: str
    project: str | None
    created_at: str
    secret: NotRequired[str]


class ExecResult(TypedDict):
    exit_code: int
    stdout: str
    stderr: str


class Page(TypedDict):
    items: list[Any]
    next: str | None
