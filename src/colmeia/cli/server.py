"""The two commands that run the house itself instead of asking a server: `doctor` and `serve`.

Everything they need is imported inside them: a laptop has only the client installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from colmeia.cli.host import CHECKS, advice
from colmeia.cli.options import Output
from colmeia.cli.output import show
from colmeia.client.errors import ClientError


@contextmanager
def _in_words() -> Iterator[None]:
    """Say what is not installed, and turn the house's own errors, which the CLI does not know by type, into its own."""
    try:
        yield
    except ImportError as error:
        hint = "Install the server part: pip install 'colmeia[server]'."
        raise ClientError("failed", "client_only", f"Only the client is installed here: {error}.", hint) from error
    except Exception as error:
        kind, code, message = (getattr(error, name, None) for name in ("kind", "code", "message"))
        if not (isinstance(kind, str) and isinstance(code, str) and isinstance(message, str)):
            raise
        raise ClientError(kind, code, message, str(getattr(error, "hint", ""))) from error


def doctor(*, output: Annotated[Output, Parameter(name=["--output", "-o"])] = "table") -> None:
    """Say what this machine can do, what is missing and how to mend it.

    For example:

        colmeia doctor
        colmeia doctor -o json

    Parameters
    ----------
    output
        How to print the result.
    """
    with _in_words():
        from colmeia.host.doctor import examine
        from colmeia.host.facts import find_facts
        from colmeia.settings import read_settings

        checks = [check.model_dump(mode="json") for check in examine(find_facts(), state=read_settings(None).state_dir)]
    show(checks, output, CHECKS)
    if output == "table":
        sys.stdout.write(advice(checks))


def serve(*, config: Path | None = None) -> None:
    """Run the daemon in the foreground until SIGTERM. Virtual machines outlive it.

    Parameters
    ----------
    config
        Configuration file (default: /etc/colmeia/colmeia.toml if it exists). Every setting also as COLMEIA_NAME.
    """
    with _in_words():
        from colmeia.daemon import run
        from colmeia.settings import read_settings

        run(read_settings(config))
