"""Events: the ordered history that clients follow."""

from datetime import datetime
from typing import Any

from pydantic import Field

from colmeia.model.base import Model


class Event(Model):
    """Something that happened. ``seq`` grows by commit order and is what a stream resumes from."""

    seq: int
    at: datetime
    project: str
    kind: str = Field(examples=["vm.state", "operation.state"])
    object_kind: str
    object_id: str
    object_name: str
    data: dict[str, Any] = Field(default_factory=dict)
