"""`colmeia project`: the tenants."""

from collections.abc import Callable
from typing import Any

from cyclopts import App

from colmeia.cli.options import COMMON, Common
from colmeia.cli.output import age, say, show

app = App(name="project", help="Projects: the tenants.", help_format="plaintext")

COLUMNS: dict[str, Callable[[Any], object]] = {
    "NAME": lambda project: project["name"],
    "ID": lambda project: project["id"],
    "AGE": lambda project: age(project["created_at"]),
}


@app.command(name="list")
def list_(*, common: Common = COMMON) -> None:
    """List the projects."""
    with common.connect() as client:
        show(client.projects.list(), common.output, COLUMNS)


@app.command
def create(name: str, /, *, common: Common = COMMON) -> None:
    """Create a project."""
    with common.connect() as client:
        project = client.projects.create(name)
    if common.output != "table":
        show(project, common.output)
    else:
        say(f"Project {project['name']} is created")


@app.command
def delete(name: str, /, *, common: Common = COMMON) -> None:
    """Delete a project that is empty."""
    with common.connect() as client:
        client.projects.delete(name)
    say(f"Project {name} is deleted")
