"""Inside the guest, through its agent: running a command."""

import base64
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, Field, ValidationError

from colmeia.control.services import Services
from colmeia.model.base import Model
from colmeia.model.errors import Conflict
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


class _Started(BaseModel):
    """Answer of guest-exec (QEMU guest agent protocol reference)."""

    pid: int


class _Status(BaseModel):
    """Answer of guest-exec-status (QEMU guest agent protocol reference)."""

    exited: bool
    exitcode: int | None = Field(default=None, ge=-(2**31), le=2**32)
    signal: int | None = Field(default=None, ge=0, le=1024)
    out_data: str = Field(default="", alias="out-data")
    err_data: str = Field(default="", alias="err-data")


A = TypeVar("A", bound=BaseModel)


async def execute(services: Services, vm: Vm, wish: Exec) -> ExecResult:
    """Run a command in the guest and return what it printed.

    Raises Conflict when the VM does not run (`vm_state`), its agent does not answer as it should (`agent_silent`,
    `agent_garbage`) or the command goes on for too long (`guest_command_timeout`).
    """
    if vm.state is not VmState.RUNNING:
        raise Conflict("vm_state", f"VM {vm.name} is {vm.state.value}, not running.", f"colmeia vm start {vm.name}")
    arguments: dict[str, Any] = {"path": wish.command[0], "arg": list(wish.command[1:]), "capture-output": True}
    if wish.input is not None:
        arguments["input-data"] = base64.b64encode(wish.input.encode()).decode()
    started = _read(_Started, await services.engine.agent(vm.id, "guest-exec", arguments, timeout_s=AGENT_TIMEOUT_S))
    with anyio.move_on_after(wish.timeout_s):
        polls = iter(POLL_S)
        while True:
            answer = await services.engine.agent(
                vm.id, "guest-exec-status", {"pid": started.pid}, timeout_s=AGENT_TIMEOUT_S
            )
            status = _read(_Status, answer)
            if status.exited:
                return _result(status)
            await anyio.sleep(next(polls, POLL_S[-1]))
    raise Conflict(
        "guest_command_timeout",
        f"{wish.command[0]} in {vm.name} did not end within {wish.timeout_s:.0f} s.",
        "It goes on there.",
    )


def _read(shape: type[A], answer: Any) -> A:
    """Read what the agent said. It runs in the guest, which may be hostile: nothing about its answer is certain."""
    try:
        return shape.model_validate(answer)
    except ValidationError as error:
        raise Conflict(
            "agent_garbage", "The guest agent's answer makes no sense.", "Look at qemu-guest-agent in the guest."
        ) from error


def _result(status: _Status) -> ExecResult:
    if status.exitcode is not None:
        exit_code = status.exitcode
    else:
        exit_code = 255 if status.signal is None else 128 + status.signal
    return ExecResult(exit_code=exit_code, stdout=_text(status.out_data), stderr=_text(status.err_data))


def _text(data: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode(errors="replace")
    except ValueError:
        return ""
