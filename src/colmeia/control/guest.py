"""Inside the guest, through its agent: running a command."""

import base64
import binascii
from typing import Any

import anyio
from pydantic import Field

from colmeia.control.services import Services
from colmeia.model.base import Model
from colmeia.model.errors import Conflict, Unavailable
from colmeia.model.vm import Vm, VmState

POLL_S = (0.02, 0.05, 0.1, 0.25)
AGENT_TIMEOUT_S = 5.0


class Exec(Model):
    """A command for the guest: a program and its arguments, no shell between."""

    command: tuple[str, ...] = Field(min_length=1, max_length=256)
    input: str | None = Field(default=None, max_length=1_000_000)
    timeout_s: float = Field(default=30.0, gt=0, le=3600)


class ExecResult(Model):
    exit_code: int
    stdout: str
    stderr: str


async def execute(services: Services, vm: Vm, wish: Exec) -> ExecResult:
    """Run a command in the guest and return what it printed.

    Raises Conflict when the VM does not run, Unavailable (`agent_silent`, `guest_command_timeout`).
    """
    if vm.state is not VmState.RUNNING:
        raise Conflict("vm_state", f"VM {vm.name} is {vm.state.value}, not running.", f"colmeia vm start {vm.name}")
    arguments: dict[str, Any] = {"path": wish.command[0], "arg": list(wish.command[1:]), "capture-output": True}
    if wish.input is not None:
        arguments["input-data"] = base64.b64encode(wish.input.encode()).decode()
    started = await services.engine.agent(vm.id, "guest-exec", arguments, timeout_s=AGENT_TIMEOUT_S)
    with anyio.move_on_after(wish.timeout_s):
        polls = iter(POLL_S)
        while True:
            status = await services.engine.agent(
                vm.id, "guest-exec-status", {"pid": started["pid"]}, timeout_s=AGENT_TIMEOUT_S
            )
            if status.get("exited"):
                return _result(status)
            await anyio.sleep(next(polls, POLL_S[-1]))
    raise Unavailable(
        "guest_command_timeout",
        f"{wish.command[0]} in {vm.name} did not end within {wish.timeout_s:.0f} s.",
        "It goes on there.",
    )


def _result(status: dict[str, Any]) -> ExecResult:
    code = status.get("exitcode")
    signal = status.get("signal")
    exit_code = code if isinstance(code, int) else 128 + signal if isinstance(signal, int) else 255
    return ExecResult(exit_code=exit_code, stdout=_text(status.get("out-data")), stderr=_text(status.get("err-data")))


def _text(data: Any) -> str:
    if not isinstance(data, str):
        return ""
    try:
        return base64.b64decode(data, validate=True).decode(errors="replace")
    except binascii.Error:
        return ""
