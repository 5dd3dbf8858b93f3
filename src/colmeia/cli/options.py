"""The options that every command has, said once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from colmeia.client import Client

Output = Literal["table", "json", "yaml"]

_GROUP = "Common options"


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True)
class Common:
    """Which server, which project, and how to print."""

    output: Annotated[Output, Parameter(name=["--output", "-o"])] = "table"
    "How to print the result."
    project: Annotated[str | None, Parameter(env_var="COLMEIA_PROJECT")] = None
    "Project to work in. Absent: your token's, or 'default'."
    server: Annotated[str | None, Parameter(env_var="COLMEIA_SERVER")] = None
    "https://HOST:PORT, http://HOST:PORT or unix:///PATH. Absent: this machine's daemon."

    def connect(self) -> Client:
        """Return a client; use it in a ``with``."""
        return Client(self.server, project=self.project)


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True)
class Changing(Common):
    """The same, for commands that start long work."""

    wait: bool = True
    "Wait for the end, or only start the work and print its operation."


COMMON = Common()
CHANGING = Changing()
