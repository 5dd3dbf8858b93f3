"""`colmeia host`: the host the server runs on, as the server sees it."""

from collections.abc import Callable
from typing import Any

from cyclopts import App

from colmeia.cli.options import COMMON, Common
from colmeia.cli.output import show, text_of

app = App(name="host", help="The host the server runs on.", help_format="plaintext")

CHECKS: dict[str, Callable[[Any], object]] = {
    "CHECK": lambda check: check["name"],
    "VERDICT": lambda check: check["verdict"],
    "FINDING": lambda check: check["finding"],
}


def advice(checks: list[Any]) -> str:
    """Write why each thing that is not well matters, and how to mend it."""
    lines = [
        f"\n{text_of(check['name'])}: {text_of(check['why'])}\n"
        + (f"  mend: {text_of(check['mend'])}\n" if check["mend"] else "")
        for check in checks
        if check["verdict"] != "ok"
    ]
    return "".join(lines)


@app.command(name="show")
def show_(*, common: Common = COMMON) -> None:
    """Show what the host has and can do."""
    with common.connect() as client:
        show(client.host.show(), common.output)
