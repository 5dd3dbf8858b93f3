"""Turning the API's JSON into what a person or a program reads. Pure but for the last step, which writes.

Tables are written here in a few lines: importing a table library takes longer than everything else they need.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from colmeia.cli.options import Output

Cell = Callable[[Any], object]
Columns = Mapping[str, Cell]


def age(since: str, now: datetime | None = None) -> str:
    """Return how long ago an RFC 3339 time was, in its largest unit: 40s, 3m, 5h, 12d."""
    seconds = int(((now or datetime.now(UTC)) - datetime.fromisoformat(since)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{max(seconds, 0)}s"


def text_of(value: object) -> str:
    """Write a cell: nothing is a dash, and control characters cannot play tricks on the terminal."""
    text = {None: "-", "": "-", True: "yes", False: "no"}.get(value) if isinstance(value, str | bool | None) else None
    text = str(value) if text is None else text
    return "".join(c if c.isprintable() else "?" for c in text)


def table(rows: Sequence[Any], columns: Columns) -> str:
    """Lay rows out in columns, two spaces apart, under their names."""
    cells = [list(columns), *([text_of(cell(row)) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in cells)


def fields(value: Mapping[str, Any], indent: int = 0) -> str:
    """Lay an object out as ``name  value`` lines, what it contains indented below its name."""
    width = max((len(key) for key in value), default=0)
    lines = []
    for key, item in value.items():
        pad = " " * indent
        if isinstance(item, Mapping) and item:
            lines.append(f"{pad}{key}\n{fields(item, indent + 2)}")
        elif isinstance(item, list) and any(isinstance(part, Mapping) for part in item):
            lines.append(f"{pad}{key}\n" + "".join(_item(part, indent + 2) for part in item))
        elif isinstance(item, list):
            lines.append(f"{pad}{key:{width}}  {text_of(', '.join(map(str, item)))}\n")
        else:
            lines.append(f"{pad}{key:{width}}  {text_of('-' if item == {} else item)}\n")
    return "".join(lines)


def _item(part: Any, indent: int) -> str:
    if not isinstance(part, Mapping):
        return f"{' ' * indent}- {text_of(part)}\n"
    body = fields(part, indent + 2)
    return f"{' ' * indent}- {body[indent + 2 :]}"


def render(value: Any, output: Output, columns: Columns | None = None) -> str:
    """Write a list as a table of ``columns``, an object as fields, either as JSON or YAML if that was asked for."""
    match output:
        case "json":
            return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        case "yaml":
            import yaml

            text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
            return text
        case "table":
            if isinstance(value, list):
                return table(value, columns or {key.upper(): _getter(key) for key in (value[0] if value else ())})
            return fields(value)


def _getter(key: str) -> Cell:
    return lambda row: row.get(key)


def show(value: Any, output: Output, columns: Columns | None = None) -> None:
    """Print a result."""
    sys.stdout.write(render(value, output, columns))


def say(line: str) -> None:
    """Print one line of result."""
    sys.stdout.write(line + "\n")


def note(line: str) -> None:
    """Tell the person something beside the result."""
    sys.stderr.write(line + "\n")


def warn(warnings: Iterable[str]) -> None:
    """Tell the person what is not as it should be."""
    for warning in warnings:
        note(f"Warning: {text_of(warning)}")
