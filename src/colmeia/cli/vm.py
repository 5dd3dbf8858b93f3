"""`colmeia vm`: virtual machines."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from colmeia.cli import vm_spec
from colmeia.cli.options import CHANGING, COMMON, Changing, Common
from colmeia.cli.output import age, note, say, show, warn
from colmeia.cli.progress import finish
from colmeia.client import Client, ClientError
from colmeia.client.shapes import Operation

app = App(name="vm", help="Virtual machines: create, start, stop, look inside.", help_format="plaintext")

Machine = Literal["q35", "microvm"]
Firmware = Literal["bios", "uefi", "direct"]
Accelerator = Literal["auto", "kvm", "tcg"]
OnCrash = Literal["restart", "stop"]
Many = Annotated[list[str] | None, Parameter(consume_multiple=False, negative="")]
Names = Annotated[str, Parameter(name="NAME", help="One or more names or ids.")]

COLUMNS: dict[str, Callable[[Any], object]] = {
    "NAME": lambda vm: vm["name"],
    "STATE": lambda vm: vm["state"],
    "CPUS": lambda vm: vm["spec"]["cpus"],
    "MEMORY": lambda vm: vm["spec"]["memory"],
    "IMAGE": lambda vm: next((disk["image"] for disk in vm["spec"]["disks"] if disk["image"]), None),
    "ACCEL": lambda vm: vm["runtime"]["accelerator"],
    "FORWARDS": lambda vm: " ".join(forwards(vm)),
    "AGE": lambda vm: age(vm["created_at"]),
}


def forwards(vm: Any) -> list[str]:
    """Return the VM's port forwards as they are written on the command line."""
    return [
        f"{'' if f['host_address'] == '127.0.0.1' else f['host_address'] + ':'}{f['host_port']}:{f['guest_port']}"
        f"{'' if f['protocol'] == 'tcp' else '/' + f['protocol']}"
        for nic in vm["spec"]["nics"]
        for f in nic["forwards"]
    ]


@app.command
def create(
    name: str,
    /,
    *,
    image: str | None = None,
    cpus: int | None = None,
    memory: str | None = None,
    disk: str | None = None,
    disk_extra: Many = None,
    forward: Many = None,
    ssh_key: Many = None,
    user: str | None = None,
    user_data: Path | None = None,
    machine: Machine | None = None,
    firmware: Firmware | None = None,
    cpu_model: str | None = None,
    accelerator: Accelerator | None = None,
    on_crash: OnCrash | None = None,
    autostart: Annotated[bool | None, Parameter(negative="")] = None,
    start: bool = False,
    common: Changing = CHANGING,
) -> None:
    """Create a virtual machine.

    For example:

        colmeia vm create demo --image tiny --start
        colmeia vm create web1 --image debian-12 --cpus 2 --memory 2GiB --disk 20GiB
            --ssh-key ~/.ssh/id_ed25519.pub --forward 2222:22 --start
        ssh -p 2222 debian@127.0.0.1
        colmeia vm create db1 --image debian-12 --disk-extra data=100GiB --autostart

    Parameters
    ----------
    name
        Its name, and its host name: small letters, digits and dashes.
    image
        Image it starts from: see 'colmeia image list'.
    cpus
        Virtual CPUs (default 1).
    memory
        Memory, such as 2GiB (default 512MiB).
    disk
        Size of the root disk, such as 20GiB (default: the image's).
    disk_extra
        Another, empty disk: NAME=SIZE. May be repeated.
    forward
        A port of this host that leads into the guest: [ADDRESS:]HOST:GUEST[/udp], such as 2222:22. May be repeated.
    ssh_key
        A public ssh key, or the file that holds it. May be repeated.
    user
        The user that cloud-init makes, and whom the keys let in.
    user_data
        A cloud-init user-data file, in place of --user and --ssh-key.
    machine
        q35 is a full PC; microvm starts faster and can less.
    firmware
        How it boots (default: direct for an image with a kernel of its own, else bios).
    cpu_model
        auto, host, max, or a model of QEMU.
    accelerator
        auto takes KVM where it works.
    on_crash
        What happens when it dies unasked (default restart).
    autostart
        Start it with the host.
    start
        Start it once it exists.
    """
    nics = [{"forwards": [vm_spec.parse_forward(text) for text in forward]}] if forward else None
    spec = vm_spec.given(
        cpus=cpus, memory=memory, machine=machine, firmware=firmware, cpu_model=cpu_model, accelerator=accelerator,
        on_crash=on_crash, autostart=autostart, nics=nics, disks=vm_spec.disks(image, disk, disk_extra or ()),
        cloud_init=vm_spec.cloud_init(ssh_key or (), user, user_data) or None,
    )  # fmt: skip
    with common.connect() as client:
        _finish(client, client.vms.create({"name": name, "spec": spec, "start": start}), common)


@app.command(name="list")
def list_(*, state: str | None = None, limit: int | None = None, common: Common = COMMON) -> None:
    """List the virtual machines.

    Parameters
    ----------
    state
        Only those in this state, such as running.
    limit
        At most so many.
    """
    with common.connect() as client:
        show(client.vms.list(state=state, limit=limit), common.output, COLUMNS)


@app.command(name="show")
def show_(name: str, /, *, common: Common = COMMON) -> None:
    """Show one virtual machine: what was asked for, what was chosen, how it is."""
    with common.connect() as client:
        vm = client.vms.show(name)
        show(vm, common.output)
        warn(vm["runtime"]["warnings"])


@app.command(name="set")
def set_(
    name: str,
    /,
    *,
    cpus: int | None = None,
    memory: str | None = None,
    cpu_model: str | None = None,
    accelerator: Accelerator | None = None,
    on_crash: OnCrash | None = None,
    autostart: bool | None = None,
    if_revision: int | None = None,
    common: Common = COMMON,
) -> None:
    """Change a virtual machine. The change holds from its next start.

    Parameters
    ----------
    if_revision
        Only if its revision still is this one.
    """
    changes = vm_spec.given(
        cpus=cpus, memory=memory, cpu_model=cpu_model, accelerator=accelerator, on_crash=on_crash, autostart=autostart
    )
    if not changes:
        raise ClientError("invalid", "nothing_to_set", "Nothing to set was given.", "See colmeia vm set --help.")
    with common.connect() as client:
        vm = client.vms.update(name, changes, if_match=if_revision)
        if common.output != "table":
            show(vm, common.output)
            return
        later = " (from its next start)" if vm["state"] != "stopped" else ""
        say(f"VM {vm['name']} is changed{later}")


@app.command
def start(*names: Names, paused: Annotated[bool, Parameter(negative="")] = False, common: Changing = CHANGING) -> int:
    """Start virtual machines.

    Parameters
    ----------
    paused
        Leave the guest's CPUs standing until 'resume'.
    """
    return _each(names, common, lambda client, name: client.vms.start(name, paused=paused))


@app.command
def stop(
    *names: Names,
    force: Annotated[bool, Parameter(negative="")] = False,
    timeout: float = 60,
    common: Changing = CHANGING,
) -> int:
    """Stop virtual machines: press the power button, and pull the plug after the timeout.

    Parameters
    ----------
    force
        Pull the plug at once.
    timeout
        Seconds the guest may take.
    """
    return _each(names, common, lambda client, name: client.vms.stop(name, force=force, timeout_s=timeout))


@app.command
def restart(
    *names: Names,
    force: Annotated[bool, Parameter(negative="")] = False,
    timeout: float = 60,
    common: Changing = CHANGING,
) -> int:
    """Stop virtual machines and start them again, with what was changed meanwhile.

    Parameters
    ----------
    force
        Pull the plug instead of pressing the power button.
    timeout
        Seconds the guest may take to stop.
    """
    return _each(names, common, lambda client, name: client.vms.restart(name, force=force, timeout_s=timeout))


@app.command
def reset(*names: Names, common: Changing = CHANGING) -> int:
    """Press the reset button."""
    return _each(names, common, lambda client, name: client.vms.reset(name))


@app.command
def pause(*names: Names, common: Changing = CHANGING) -> int:
    """Stop the guest's CPUs; memory and devices stay."""
    return _each(names, common, lambda client, name: client.vms.pause(name))


@app.command
def resume(*names: Names, common: Changing = CHANGING) -> int:
    """Let the guest's CPUs go on."""
    return _each(names, common, lambda client, name: client.vms.resume(name))


@app.command
def delete(*names: Names, force: Annotated[bool, Parameter(negative="")] = False, common: Changing = CHANGING) -> int:
    """Delete virtual machines and their disks.

    Parameters
    ----------
    force
        Stop them first if they run.
    """
    return _each(names, common, lambda client, name: client.vms.delete(name, force=force))


@app.command
def console(name: str, /, *, idle: float = 1.0, common: Common = COMMON) -> int:
    """Attach to the serial console. ~. at the start of a line leaves; ~~ sends a ~.

    For example:

        colmeia vm console web1
        echo uptime | colmeia vm console web1

    Parameters
    ----------
    idle
        When the input is a pipe that has ended: leave once the guest was silent for so many seconds.
    """
    from colmeia.cli.console import attach

    return attach(common, name, idle)


@app.command
def vnc(name: str, /, *, port: int = 0, common: Common = COMMON) -> int:
    """Offer the screen to a VNC viewer, on a port of 127.0.0.1, until Ctrl-C.

    For example:

        colmeia vm vnc web1 --port 5901
        vncviewer 127.0.0.1:5901

    Parameters
    ----------
    port
        The port; 0 takes a free one and says which.
    """
    from colmeia.cli.console import forward_vnc

    return forward_vnc(common, name, port)


@app.command
def screenshot(name: str, file: Path, /, *, common: Common = COMMON) -> None:
    """Save the screen as a PNG file; - writes it to the output."""
    with common.connect() as client:
        png = client.vms.screenshot(name)
    if str(file) == "-":
        sys.stdout.buffer.write(png)
    else:
        file.write_bytes(png)


@app.command(name="exec")
def exec_(
    name: str,
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    stdin: Annotated[bool, Parameter(negative="")] = False,
    timeout: float = 30,
    common: Common = COMMON,
) -> int:
    """Run a command in the guest, through its agent. Ends with the command's exit code.

    For example:

        colmeia vm exec web1 -- uname -a
        colmeia vm exec web1 -- sh -c 'df -h /'
        colmeia vm exec web1 --stdin -- tee /etc/motd < motd

    Parameters
    ----------
    command
        The program and its arguments, after --.
    stdin
        Hand this command's input to it.
    timeout
        Seconds it may take.
    """
    with common.connect() as client:
        text = sys.stdin.read() if stdin else None
        result = client.vms.exec(name, command, stdin=text, timeout_s=timeout)
    if common.output != "table":
        show(result, common.output)
        return result["exit_code"]
    sys.stdout.write(result["stdout"])
    sys.stderr.write(result["stderr"])
    return result["exit_code"]


@app.command
def logs(
    name: str,
    /,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False,
    lines: Annotated[int | None, Parameter(name=["--lines", "-n"])] = None,
    common: Common = COMMON,
) -> None:
    """Print what the guest wrote to its serial console.

    Parameters
    ----------
    follow
        Go on with what comes, until Ctrl-C.
    lines
        Only the last so many lines.
    """
    with common.connect() as client, ExitStack() as stack:
        if not follow:
            sys.stdout.write(client.vms.logs(name, lines=lines))
            return
        stack.callback(sys.stdout.flush)
        for chunk in client.vms.follow_logs(name, lines=lines):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def _finish(client: Client, operation: Operation, common: Changing) -> None:
    """Wait if that was asked for, and say how it is now."""
    vm = finish(client, operation, common, "VM", client.vms.show)
    if vm is not None and vm["state"] in ("running", "paused"):
        warn(vm["runtime"]["warnings"])


def _each(names: tuple[str, ...], common: Changing, ask: Callable[[Client, str], Operation]) -> int:
    """Ask for all, then wait for all. One that fails is told and does not keep the others back."""
    from colmeia.cli.main import report

    if not names:
        raise ClientError("invalid", "name_missing", "No VM was named.", "colmeia vm list shows them.")
    codes: list[int] = []
    with common.connect() as client:
        asked: list[Operation] = []
        for name in names:
            try:
                asked.append(ask(client, name))
            except ClientError as error:
                codes.append(report(error))
        for operation in asked:
            try:
                _finish(client, operation, common)
            except ClientError as error:
                codes.append(report(error))
            except KeyboardInterrupt:
                note(f"Operation {operation['id']} goes on: colmeia operation wait {operation['id']}")
                raise
    return codes[0] if codes else 0
