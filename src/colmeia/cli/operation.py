"""`colmeia operation`: long work."""

import re
from collections.abc import Callable
from typing import Any

from cyclopts import App

from colmeia.cli.options import COMMON, Common
from colmeia.cli.output import age, say, show
from colmeia.cli.progress import wait_done
from colmeia.client import Client

app = App(name="operation", help="Long work: what runs, what happened, wait, cancel.", help_format="plaintext")

COLUMNS: dict[str, Callable[[Any], object]] = {
    "ID": lambda operation: operation["id"],
    "KIND": lambda operation: operation["kind"],
    "TARGET": lambda operation: operation["target_name"],
    "STATE": lambda operation: operation["state"],
    "DONE": lambda operation: f"{operation['progress']:.0%}",
    "BY": lambda operation: operation["requested_by"],
    "AGE": lambda operation: age(operation["created_at"]),
    "MESSAGE": lambda operation: (operation["error"] or {}).get("detail") or operation["message"],
}


@app.command(name="list")
def list_(*, state: str | None = None, target: str | None = None, limit: int = 50, common: Common = COMMON) -> None:
    """List operations, newest first.

    Parameters
    ----------
    state
        Only those in this state: queued, running, done, failed, cancelled.
    target
        Only those on this VM (name or id), or on the object with this id.
    limit
        At most so many.
    """
    with common.connect() as client:
        found = client.operations.list(state=state, target=_target_id(client, target), limit=limit)
        show(found, common.output, COLUMNS)


def _target_id(client: Client, target: str | None) -> str | None:
    if target is None or re.fullmatch(r"[0-9a-f]{16}", target):
        return target
    return client.vms.show(target)["id"]


@app.command(name="show")
def show_(operation: str, /, *, common: Common = COMMON) -> None:
    """Show one operation."""
    with common.connect() as client:
        show(client.operations.show(operation), common.output)


@app.command
def wait(operation: str, /, *, timeout: float | None = None, common: Common = COMMON) -> None:
    """Wait until an operation is done; fails as the operation fails.

    Parameters
    ----------
    timeout
        Give up waiting after so many seconds. The operation goes on.
    """
    with common.connect() as client:
        ended = wait_done(client, client.operations.show(operation), timeout)
        if common.output != "table":
            show(ended, common.output)
        else:
            say(f"Operation {ended['id']} ({ended['kind']} {ended['target_name']}) is {ended['state']}")


@app.command
def cancel(operation: str, /, *, common: Common = COMMON) -> None:
    """Ask a running operation to end and undo what it did."""
    with common.connect() as client:
        latest = client.operations.cancel(operation)
        if common.output != "table":
            show(latest, common.output)
        else:
            asked = "" if latest["state"] == "cancelled" else ", asked to cancel"
            say(f"Operation {latest['id']} is {latest['state']}{asked}")
