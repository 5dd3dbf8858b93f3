"""The ground every noun stands on: frozen models, ids, names and sizes with a unit.

Refuses to do I/O. Everything here is parsed once, at the edge; inside the house a value is already valid.
"""

import re
import secrets
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, StringConstraints

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_UNITS = {"": 1, "B": 1, "K": KIB, "KIB": KIB, "M": MIB, "MIB": MIB, "G": GIB, "GIB": GIB, "T": TIB, "TIB": TIB}
_SIZE = re.compile(r"(\d{1,19})(?:\.(\d{1,6}))?\s*([A-Za-z]*)", re.ASCII)
_SIZE_MAX = 1 << 62
SIZE_PATTERN = r"^\d{1,19}(\.\d{1,6})?\s*([KkMmGgTt]([Ii][Bb])?|[Bb])?$"
ID_PATTERN = r"^[0-9a-f]{16}$"
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


class Model(BaseModel):
    """Base of every domain value: frozen, and a field nobody knows is an error instead of being dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_size(value: Any) -> int:
    """Read a size in bytes from an integer or from text such as ``512MiB``, ``1.5 GiB`` or ``4G`` (binary units).

    Raises ValueError for anything else, for fractions of a byte and for sizes of 4 EiB and more.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a size is a whole number of bytes or text such as '512MiB' or '2GiB'")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip())
        unit = _UNITS.get(match[3].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(f"{value[:40]!r} is not a size: write a number and KiB, MiB, GiB or TiB, such as '2GiB'")
        fraction = match[2] or ""
        scaled = int(match[1] + fraction) * unit
        size, rest = divmod(scaled, 10 ** len(fraction))
        if rest:
            raise ValueError(f"{value!r} is not a whole number of bytes")
    if not 0 <= size < _SIZE_MAX:
        raise ValueError("a size lies between 0 and 4 EiB")
    return size


def format_size(size: int) -> str:
    """Write a size exactly, in the largest binary unit that divides it: 1536 MiB stays ``1536MiB``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}B"


def _refuse_id_like(name: str) -> str:
    if re.fullmatch(ID_PATTERN, name):
        raise ValueError("a name of 16 hexadecimal digits would be taken for an id: choose another")
    return name


Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=int | str),
    PlainSerializer(format_size, return_type=str),
    Field(examples=["512MiB", "20GiB"]),
]
"""Bytes. Text with a binary unit on the wire, an integer inside."""

Id = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=63), AfterValidator(_refuse_id_like)]
"""A host-name label (RFC 1123): it becomes the guest's host name."""


def new_id() -> str:
    """Return a fresh random id of 64 bits: 16 hexadecimal digits."""
    return secrets.token_hex(8)
