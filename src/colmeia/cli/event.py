"""`colmeia event`: what happened, and what happens."""

import json
import sys
from collections.abc import Callable
from typing import Any

from cyclopts import App

from colmeia.cli.options import COMMON, Common
from colmeia.cli.output import show, text_of

app = App(name="event", help="What happened, and what happens.", help_format="plaintext")

COLUMNS: dict[str, Callable[[Any], object]] = {
    "SEQ": lambda event: event["seq"],
    "AT": lambda event: event["at"][:19],
    "KIND": lambda event: event["kind"],
    "OBJECT": lambda event: f"{event['object_kind']}/{event['object_name']}",
    "DATA": lambda event: brief(event["data"]),
}


def brief(data: dict[str, Any]) -> str:
    """Write an event's data as ``key=value`` words."""
    return " ".join(
        f"{key}={value if isinstance(value, str | int) else json.dumps(value)}" for key, value in data.items()
    )


@app.command(name="list")
def list_(*, limit: int = 100, common: Common = COMMON) -> None:
    """List past events, newest first.

    Parameters
    ----------
    limit
        At most so many.
    """
    with common.connect() as client:
        show(client.events.history(limit=limit), common.output, COLUMNS)


@app.command
def follow(*, after: int | None = None, common: Common = COMMON) -> None:
    """Print events as they happen, until Ctrl-C. With -o json or yaml: one JSON object per line.

    Parameters
    ----------
    after
        Begin behind this sequence number instead of now.
    """
    with common.connect() as client:
        for event in client.events.follow("now" if after is None else after):
            if common.output == "table":
                line = "  ".join(text_of(cell(event)) for cell in COLUMNS.values())
            else:
                line = json.dumps(event, ensure_ascii=False)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
