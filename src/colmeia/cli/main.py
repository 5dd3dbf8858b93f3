"""The command `colmeia`: finds the noun, runs it, and turns every error into a sentence and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 conflict, 5 not permitted, 6 server unreachable.
Refuses to import what a command does not need: `colmeia vm list` has 0.25 s for everything.
"""

import os
import sys

from cyclopts import App

from colmeia import __version__
from colmeia.client.errors import ClientError

EXIT_CODES = {
    "invalid": 2,
    "not_found": 3,
    "conflict": 4,
    "busy": 4,
    "precondition_failed": 4,
    "forbidden": 5,
    "unauthenticated": 5,
    "unreachable": 6,
}

NOUNS = {
    "vm": "Virtual machines: create, start, stop, look inside.",
    "image": "Images virtual machines start from.",
    "operation": "Long work: what runs, what happened, wait, cancel.",
    "event": "What happened, and what happens.",
    "project": "Projects: the tenants.",
    "token": "Bearer tokens for the API.",
    "host": "The host the server runs on.",
}

app = App(
    name="colmeia",
    help="""Turn this machine into a KVM cloud: virtual machines from one command.

First steps:

    colmeia doctor                               what this machine can do
    colmeia image build tiny                     a small image for trying out
    colmeia vm create web1 --image tiny --start  a virtual machine
    colmeia vm console web1                      its console; ~. leaves

The server is the local socket, or COLMEIA_SERVER (https://HOST:PORT, with COLMEIA_TOKEN and COLMEIA_CA).
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 conflict, 5 not permitted, 6 server unreachable.""",
    help_format="plaintext",
    version=__version__,
    version_flags=["--version"],
    result_action="return_value",
)
for _noun, _help in NOUNS.items():
    app.command(f"colmeia.cli.{_noun}:app", name=_noun, help=_help)
app.command(
    "colmeia.cli.server:doctor", name="doctor", help="What this machine can do, what is missing, how to mend it."
)
app.command("colmeia.cli.server:serve", name="serve", help="Run the daemon.")
app.command("colmeia.cli.completion:app", name="completion", help="Completion for your shell.")


def report(error: ClientError) -> int:
    """Print the error to stderr and return the exit code."""
    lines = [f"Error: {error.detail}"]
    for wrong in getattr(error, "errors", ())[1:]:  # the first one is the detail
        lines.append(f"  {wrong['field']}: {wrong['message']}")
    if error.hint:
        lines.append(f"Hint: {error.hint}")
    sys.stderr.write("\n".join(lines) + "\n")
    return EXIT_CODES.get(error.kind, 1)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        result = app(arguments)
        sys.stdout.flush()
    except ClientError as error:
        return report(error)
    except BrokenPipeError:  # the reader of a pipe left; nothing more can be said to it, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # a file the user named
        sys.stderr.write(f"Error: {error.filename or ''}: {error.strerror or error}\n".replace(": :", ":"))
        return 1
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `colmeia` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
