"""The engine: which QEMUs run, what they do, how they end.

It keeps one `_Machine` per live process: the pidfd that tells its end, the QMP session, the consoles. The process is
the truth; everything here can be thrown away and found again by `adopt`. It refuses to run two QEMUs for one VM (the
lock in the run folder, inherited by QEMU) and never restarts one: what an end means is for control to decide.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio import to_thread
from pydantic import ValidationError

from colmeia.engine.interface import ByteStream, LaunchRequest, Observation, OnExit, OnState
from colmeia.engine.qemu import command, process
from colmeia.engine.qemu.agent import run_command
from colmeia.engine.qemu.launch import AlreadyRunsError, launch
from colmeia.engine.qemu.process import Process
from colmeia.engine.qemu.serial import SerialHub, SocketBytes
from colmeia.engine.qemu.session import Session
from colmeia.model.errors import ColmeiaError, Conflict, OutcomeUnknown, Unavailable, Unsupported
from colmeia.model.host import HostFacts
from colmeia.model.vm import Died, Machine, Runtime, VmState

_ADOPT_S = 5.0
_KILL_S = 10.0
_LAST_EVENTS_S = 0.5  # how long the last events of an ended process may take from its socket to us
_TRIM_S = 60.0
_LOG_LIMIT = 64 * 1024 * 1024
_LOG_KEEP = 4 * 1024 * 1024
_SCREEN_LIMIT = 64 * 1024 * 1024

_EXPECTED = {
    "guest-shutdown": "guest shut down",
    "host-qmp-quit": "ended by Colmeia",
}
_REASONS = {
    "host-signal": "ended by a signal from outside",
    "host-error": "ended by an error of QEMU",
    "guest-panic": "the guest's kernel panicked",
    "guest-reset": "ended by the guest's reset",
    "subsystem-reset": "ended by a reset",
}
_PORT_TAKEN = re.compile(r"Could not set up host forwarding rule '([^']*)'")
_log = structlog.get_logger(__name__)


class _Machine:
    """A VM whose process lives, or has just ended."""

    def __init__(self, vm_id: str, process: Process, run: Path, runtime: Runtime, session: Session) -> None:
        self.vm_id = vm_id
        self.process = process
        self.run = run
        self.runtime = runtime
        self.session = session
        self.serial = SerialHub(run / "serial.sock")
        self.agent_turn = anyio.Lock()
        self.state = VmState.RUNNING
        self.starting = False  # while `start` is on its way, a failure is its own to report
        self.ending = False  # we asked for the end
        self.shutdown_reason = ""  # from QEMU's last event
        self.died: Died | None = None
        self.gone = anyio.Event()
        self.watcher: asyncio.Task[None] | None = None


class QemuEngine:
    """`colmeia.engine.interface.Engine` on QEMU. ``run_dir`` is on a tmpfs, ``log_dir`` outlives the host's boot."""

    def __init__(self, facts: HostFacts, run_dir: Path, log_dir: Path, on_exit: OnExit, on_state: OnState) -> None:
        self._facts = facts
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._on_exit = on_exit
        self._on_state = on_state
        self._machines: dict[str, _Machine] = {}
        self._turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._looks: set[asyncio.Task[None]] = set()

    # Lifecycle

    async def start(self, request: LaunchRequest, *, deadline_s: float) -> Runtime:
        """See `Engine.start`. Idempotent: a QEMU that runs is left alone, and its choices are returned again."""
        vm_id = request.vm_id
        plan = command.plan(request, self._facts, self._logs(vm_id))
        async with self._turns[vm_id]:
            if (machine := self._machines.get(vm_id)) is None:
                try:
                    with anyio.fail_after(deadline_s):
                        return await self._launch(request, plan)
                except TimeoutError:
                    raise Unavailable(
                        "start_timeout", f"QEMU of VM {request.name} did not answer in {deadline_s:g} s.", "Try again."
                    ) from None
                except AlreadyRunsError:
                    machine = await self._adopt(vm_id)
            if machine is None:
                message = f"A process that cannot be found holds VM {request.name}'s lock."
                raise Conflict("vm_locked", message, "Try again in a moment.")
            return machine.runtime

    async def _launch(self, request: LaunchRequest, plan: command.Plan) -> Runtime:
        vm_id = request.vm_id
        child = await to_thread.run_sync(launch, plan, self._run(vm_id), self._logs(vm_id))
        runtime = plan.runtime.model_copy(update={"pid": child.pid, "started_at": datetime.now(UTC)})
        machine = self._register(vm_id, child, runtime)
        machine.starting = True
        machine.state = VmState.PAUSED if request.paused else VmState.RUNNING
        try:
            await machine.session.open()
            (machine.run / "runtime.json").write_text(runtime.model_dump_json())
        except BaseException as error:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_KILL_S):
                ended_itself = await self._give_up(machine)
            if isinstance(error, ColmeiaError) and ended_itself:
                raise _explain(request.name, machine.died) from error
            raise
        machine.starting = False
        if machine.gone.is_set():  # it answered and ended before we looked up
            raise _explain(request.name, machine.died)
        return runtime

    async def _give_up(self, machine: _Machine) -> bool:
        """End a process whose start failed; answer whether it had ended by itself."""
        with anyio.move_on_after(_LAST_EVENTS_S):
            await machine.gone.wait()
        ended_itself = machine.gone.is_set() and not machine.ending
        await self._kill(machine)
        return ended_itself

    async def adopt(self, vm_id: str) -> Observation:
        """See `Engine.adopt`. Idempotent."""
        async with self._turns[vm_id]:
            machine = self._machines.get(vm_id) or await self._adopt(vm_id)
        if machine is None:
            return Observation(VmState.STOPPED, None)
        return Observation(machine.state, machine.process.pid)

    async def _adopt(self, vm_id: str, *, to_kill: bool = False) -> _Machine | None:
        found = await to_thread.run_sync(process.find, self._run(vm_id), vm_id)
        if found is None:
            return None
        machine = self._register(vm_id, found, _read_runtime(self._run(vm_id), found.pid))
        if to_kill:
            return machine
        try:
            with anyio.fail_after(_ADOPT_S):
                await machine.session.open()
            machine.state = await self._ask_state(machine)
        except (ColmeiaError, TimeoutError) as error:
            # The process lives: that is what counts. Its session is tried again until it answers.
            machine.session.keep_trying()
            _log.warning("adopted without an answer", vm=vm_id, pid=found.pid, error=str(error))
        return None if machine.gone.is_set() else machine

    def _register(self, vm_id: str, found: Process, runtime: Runtime) -> _Machine:
        run = self._run(vm_id)

        def on_event(name: str, data: Mapping[str, Any]) -> None:
            self._take_event(machine, name, data)

        def on_reconnect() -> None:
            look = asyncio.create_task(self._look_again(machine), name=f"look {vm_id}")
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)

        machine = _Machine(vm_id, found, run, runtime, Session(vm_id, run / "qmp.sock", on_event, on_reconnect))
        self._machines[vm_id] = machine
        machine.watcher = asyncio.create_task(self._watch(machine), name=f"watch {vm_id}")
        return machine

    async def observe(self, vm_id: str) -> Observation:
        """See `Engine.observe`. A QEMU that does not answer at the moment is reported as it was last seen."""
        machine = self._machines.get(vm_id)
        if machine is None:
            return await self.adopt(vm_id)
        with contextlib.suppress(ColmeiaError):
            await self._look(machine)
        if machine.gone.is_set() or not machine.process.is_alive():
            return Observation(VmState.STOPPED, None)
        return Observation(machine.state, machine.process.pid)

    async def pause(self, vm_id: str) -> None:
        await self._machine(vm_id).session.execute("stop")

    async def resume(self, vm_id: str) -> None:
        await self._machine(vm_id).session.execute("cont")

    async def reset(self, vm_id: str) -> None:
        await self._machine(vm_id).session.execute("system_reset")

    async def press_power_button(self, vm_id: str) -> None:
        await self._machine(vm_id).session.execute("system_powerdown")

    async def wait_gone(self, vm_id: str, *, timeout_s: float) -> bool:
        """See `Engine.wait_gone`."""
        if (machine := self._machines.get(vm_id)) is None:
            return True
        with anyio.move_on_after(timeout_s):
            await machine.gone.wait()
        return machine.gone.is_set()

    async def kill(self, vm_id: str) -> None:
        """See `Engine.kill`. Idempotent."""
        machine = self._machines.get(vm_id)
        if machine is None:
            async with self._turns[vm_id]:
                machine = self._machines.get(vm_id) or await self._adopt(vm_id, to_kill=True)
        if machine is not None:
            await self._kill(machine)

    async def _kill(self, machine: _Machine) -> None:
        if not machine.gone.is_set() and machine.process.is_alive():
            machine.ending = True
            machine.process.kill()
        with anyio.move_on_after(_KILL_S):
            await machine.gone.wait()
        if not machine.gone.is_set():
            message = f"QEMU (pid {machine.process.pid}) was killed but is not gone: the kernel holds it."
            raise OutcomeUnknown("kill_timeout", message, "Often its disk does not answer: look before anything else.")

    async def forget(self, vm_id: str) -> None:
        """See `Engine.forget`. Idempotent. Raises Conflict (`vm_running`)."""
        if (await self.observe(vm_id)).pid is not None:
            raise Conflict("vm_running", f"VM {vm_id} runs: its folder stays.", "Stop it first.")
        for folder in (self._run(vm_id), self._logs(vm_id)):
            await to_thread.run_sync(lambda path: shutil.rmtree(path, ignore_errors=True), folder)
        self._turns.pop(vm_id, None)

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        machines = list(self._machines.values())
        self._machines.clear()
        tasks = [*self._looks, *(machine.watcher for machine in machines if machine.watcher is not None)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for machine in machines:
            await machine.serial.aclose()
            await machine.session.aclose()
            machine.process.close()

    # Screens, consoles, the agent

    async def screenshot(self, vm_id: str) -> bytes:
        """See `Engine.screenshot`. QEMU writes into an anonymous file of ours; it could open no other."""
        machine = self._with_screen(vm_id)
        fd = os.memfd_create("screen", os.MFD_CLOEXEC)
        try:
            # QEMU takes a descriptor of a set only when it was opened just as it asks: for writing alone
            writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                number = await machine.session.add_to_set(writer)
            finally:
                os.close(writer)
            try:
                target = {"filename": f"/dev/fdset/{number}", "format": "png"}
                await machine.session.execute("screendump", target)
            finally:
                with anyio.CancelScope(shield=True), contextlib.suppress(ColmeiaError):
                    await machine.session.execute("remove-fd", {"fdset-id": number})
            return os.pread(fd, _SCREEN_LIMIT, 0)
        finally:
            os.close(fd)

    async def open_serial(self, vm_id: str) -> ByteStream:
        return await self._machine(vm_id).serial.open()

    async def open_vnc(self, vm_id: str) -> ByteStream:
        """See `Engine.open_vnc`. The connection is a socket pair: there is nothing on the host to connect to."""
        machine = self._with_screen(vm_id)
        ours, theirs = socket.socketpair()
        try:
            name = f"vnc-{theirs.fileno()}"
            await machine.session.give_descriptor(name, theirs.fileno())
            await machine.session.execute("add_client", {"protocol": "vnc", "fdname": name, "skipauth": True})
            ours.setblocking(False)
            return await SocketBytes.wrap(ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    async def agent(self, vm_id: str, command: str, arguments: dict[str, Any] | None, *, timeout_s: float) -> Any:
        """See `Engine.agent`. One command at a time per VM; waiting for the turn counts towards ``timeout_s``."""
        machine = self._machine(vm_id)
        until = anyio.current_time() + timeout_s
        async with _turn(machine.agent_turn, command, timeout_s):
            left = max(0.0, until - anyio.current_time())
            return await run_command(machine.run / "agent.sock", command, arguments, timeout_s=left)

    def serial_log(self, vm_id: str) -> Path:
        return self._logs(vm_id) / "serial.log"

    # The end of a process, and what QEMU reports

    async def _watch(self, machine: _Machine) -> None:
        """Wait for the end of the process; meanwhile keep its logs bounded."""
        while True:
            with anyio.move_on_after(_TRIM_S):
                await anyio.wait_readable(machine.process.pidfd)
                break
            for name in ("serial.log", "qemu.log"):
                path = self._logs(machine.vm_id) / name
                await to_thread.run_sync(lambda log: process.trim(log, limit=_LOG_LIMIT, keep=_LOG_KEEP), path)
        await self._finish(machine)

    async def _finish(self, machine: _Machine) -> None:
        exit_code = machine.process.reap()
        with anyio.move_on_after(_LAST_EVENTS_S):
            await machine.session.wait_lost()
        await machine.session.aclose()
        await machine.serial.aclose()
        reason, expected = _why(machine, exit_code)
        tail = await to_thread.run_sync(process.log_tail, self._logs(machine.vm_id) / "qemu.log")
        machine.process.close()
        machine.died = Died(at=datetime.now(UTC), reason=reason, exit_code=exit_code, log_tail=tail)
        if self._machines.get(machine.vm_id) is machine:
            del self._machines[machine.vm_id]
        machine.gone.set()
        _log.info("qemu ended", vm=machine.vm_id, pid=machine.process.pid, reason=reason, expected=expected)
        if not machine.starting:
            self._on_exit(machine.vm_id, machine.died, expected)

    def _take_event(self, machine: _Machine, name: str, data: Mapping[str, Any]) -> None:
        match name:
            case "SHUTDOWN":
                machine.shutdown_reason = str(data.get("reason", ""))
            case "STOP" if not machine.shutdown_reason:
                self._set_state(machine, VmState.PAUSED)
            case "RESUME":
                self._set_state(machine, VmState.RUNNING)
            case "BLOCK_IO_ERROR":
                _log.warning("disk error", vm=machine.vm_id, node=data.get("node-name"), reason=data.get("reason"))
            case _:
                pass

    def _set_state(self, machine: _Machine, state: VmState) -> None:
        if machine.state is not state:
            machine.state = state
            if not machine.starting:
                self._on_state(machine.vm_id, state)

    async def _look(self, machine: _Machine) -> VmState:
        state = await self._ask_state(machine)
        if not machine.shutdown_reason:
            self._set_state(machine, state)
        return state

    async def _look_again(self, machine: _Machine) -> None:
        with contextlib.suppress(ColmeiaError):
            await self._look(machine)

    async def _ask_state(self, machine: _Machine) -> VmState:
        answer = await machine.session.execute("query-status")
        return VmState.RUNNING if answer["running"] else VmState.PAUSED

    # Small things

    def _run(self, vm_id: str) -> Path:
        return self._run_dir / vm_id

    def _logs(self, vm_id: str) -> Path:
        return self._log_dir / vm_id

    def _machine(self, vm_id: str) -> _Machine:
        machine = self._machines.get(vm_id)
        if machine is None:
            raise Conflict("vm_not_running", f"VM {vm_id} does not run.", "Start it first.")
        return machine

    def _with_screen(self, vm_id: str) -> _Machine:
        machine = self._machine(vm_id)
        if machine.runtime.machine_version == Machine.MICROVM:
            raise Unsupported("no_display", "A microvm has no screen.", "Use its serial console, or machine q35.")
        return machine


@contextlib.asynccontextmanager
async def _turn(lock: anyio.Lock, what: str, timeout_s: float) -> AsyncIterator[None]:
    try:
        with anyio.fail_after(timeout_s):
            await lock.acquire()
    except TimeoutError:
        raise Conflict(
            "agent_silent", f"The guest agent was busy with another command for {timeout_s:g} s.", f"Try {what} again."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _read_runtime(run: Path, pid: int) -> Runtime:
    """Read what was chosen at the start; only the pid is certain when the daemon died before it wrote that down."""
    try:
        runtime = Runtime.model_validate_json((run / "runtime.json").read_bytes())
    except (OSError, ValidationError):
        return Runtime(pid=pid)
    return runtime if runtime.pid == pid else Runtime(pid=pid)


def _why(machine: _Machine, exit_code: int | None) -> tuple[str, bool]:
    """Say why a process ended and whether that was expected: by the guest's power-off, or because we asked."""
    if machine.ending:
        return "ended by Colmeia", True
    if exit_code is not None and exit_code < 0:
        return f"killed by signal {-exit_code} ({signal.Signals(-exit_code).name})", False
    if machine.shutdown_reason in _EXPECTED and not exit_code:
        return _EXPECTED[machine.shutdown_reason], True
    if machine.shutdown_reason in _REASONS:
        return _REASONS[machine.shutdown_reason], False
    return ("ended without a word" if exit_code is None else f"exit code {exit_code}"), False


def _explain(name: str, died: Died | None) -> ColmeiaError:
    """Turn QEMU's last words at a failed start into an error that says what to do."""
    words = " ".join(died.log_tail[-3:]) if died else ""
    reason = died.reason if died else "it ended"
    if match := _PORT_TAKEN.search(words):
        return Conflict("port_in_use", f"Cannot forward '{match[1]}': the port is in use.", "Choose another port.")
    if "Failed to get" in words and "lock" in words:
        return Conflict("disk_in_use", f"A disk of VM {name} is open in another program: {words}", "Close that first.")
    if "Cannot allocate memory" in words or "cannot set up guest memory" in words:
        return Unavailable("memory_exhausted", f"The host has no memory left for VM {name}.", "Stop another VM.")
    message = f"QEMU of VM {name} ended at start ({reason}): {words or 'it wrote nothing'}"
    return Unavailable("qemu_exited", message, "See its qemu.log.")
