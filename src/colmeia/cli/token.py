"""`colmeia token`: bearer tokens for the API."""

from collections.abc import Callable
from typing import Any, Literal

from cyclopts import App

from colmeia.cli.options import COMMON, Common
from colmeia.cli.output import age, note, say, show

app = App(name="token", help="Bearer tokens for the API.", help_format="plaintext")

COLUMNS: dict[str, Callable[[Any], object]] = {
    "NAME": lambda token: token["name"],
    "ROLE": lambda token: token["role"],
    "PROJECT": lambda token: token["project"] or "(all)",
    "ID": lambda token: token["id"],
    "AGE": lambda token: age(token["created_at"]),
}


@app.command(name="list")
def list_(*, common: Common = COMMON) -> None:
    """List the tokens, without their secrets."""
    with common.connect() as client:
        show(client.tokens.list(), common.output, COLUMNS)


@app.command
def create(name: str, /, *, role: Literal["admin", "member", "viewer"] = "member", common: Common = COMMON) -> None:
    """Create a token and print its secret: this once, and alone on the output.

    For example:

        export COLMEIA_TOKEN=$(colmeia token create laptop --role admin)
        export COLMEIA_SERVER=https://host.example.org:8443

    Parameters
    ----------
    role
        admin may do everything, member everything inside one project, viewer may look at it. The project is --project.
    """
    with common.connect() as client:
        project = None if role == "admin" else common.project or "default"
        token = client.tokens.create(name, role=role, project=project)
    if common.output != "table":
        show(token, common.output)
        return
    say(token["secret"])
    note(f"Token {token['name']} ({token['role']}) is created. Keep the secret: it is not shown again.")


@app.command
def delete(name: str, /, *, common: Common = COMMON) -> None:
    """Delete a token: whoever holds it is out at once."""
    with common.connect() as client:
        client.tokens.delete(name)
    say(f"Token {name} is deleted")
