"""Waiting for an operation, with a bar on a terminal and in silence elsewhere, and saying how it ended."""

import sys
from collections.abc import Callable
from typing import TypeVar

from colmeia.cli.options import Changing
from colmeia.cli.output import say, show
from colmeia.client import Client
from colmeia.client.call import FINAL_STATES
from colmeia.client.shapes import Image, Operation, Vm

T = TypeVar("T", Vm, Image)

_SHOW_AFTER_S = 0.3


def wait_done(client: Client, operation: Operation, timeout_s: float | None = None) -> Operation:
    """Return the operation once it is done. Ctrl-C stops the waiting, not the work. Raises as `Operations.wait`."""
    if not sys.stderr.isatty():
        return client.operations.wait(operation, timeout_s=timeout_s)
    first = client.operations.look(operation, _SHOW_AFTER_S)
    if first["state"] in FINAL_STATES:
        return client.operations.wait(first)
    return _wait_with_bar(client, first, timeout_s)


def finish(client: Client, operation: Operation, common: Changing, label: str, look: Callable[[str], T]) -> T | None:
    """Wait if that was asked for, and say how the object is now; return it when there is one to see."""
    if not common.wait:
        if common.output != "table":
            show(operation, common.output)
        else:
            say(f"Operation {operation['id']} ({operation['kind']} {operation['target_name']}) is {operation['state']}")
        return None
    ended = wait_done(client, operation)
    if ended["kind"].endswith(".delete"):
        say(f"{label} {ended['target_name']} is deleted") if common.output == "table" else show(ended, common.output)
        return None
    found = look(ended["target_id"])
    if common.output != "table":
        show(found, common.output)
    else:
        say(f"{label} {found['name']} is {found['state']}")
    return found


def _wait_with_bar(client: Client, operation: Operation, timeout_s: float | None) -> Operation:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    what = f"{operation['kind']} {operation['target_name']}"
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(what), total=1.0)

        def advance(latest: Operation) -> None:
            text = f"{what}: {latest['message']}" if latest["message"] else what
            progress.update(task, completed=latest["progress"], description=escape(text))

        return client.operations.wait(operation, timeout_s=timeout_s, on_progress=advance)
