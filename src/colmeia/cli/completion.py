"""`colmeia completion`: completion for the user's shell."""

from typing import Literal

from cyclopts import App

from colmeia.cli.output import say

app = App(name="completion", help="Completion for your shell.", help_format="plaintext")

Shell = Literal["bash", "zsh", "fish"]


@app.command
def show(shell: Shell, /) -> None:
    """Print the completion script.

    For example:

        source <(colmeia completion show bash)
    """
    from colmeia.cli.main import app as colmeia

    say(colmeia.generate_completion(shell=shell))


@app.command
def install(shell: Shell, /) -> None:
    """Write the completion script where the shell looks for it, and say where that is."""
    from colmeia.cli.main import app as colmeia

    say(str(colmeia.install_completion(shell=shell, add_to_startup=False)))
