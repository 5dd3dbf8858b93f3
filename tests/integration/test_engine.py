"""The engine against real QEMU processes: nothing boots here but the BIOS, so that each test takes a moment."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from colmeia.engine.interface import ByteStream, LaunchRequest, OpenDisk
from colmeia.engine.qemu import process
from colmeia.engine.qemu.engine import QemuEngine
from colmeia.model.base import MIB, new_id
from colmeia.model.block import BlockFormat, BlockSource
from colmeia.model.errors import ColmeiaError, Conflict, Unavailable, Unsupported
from colmeia.model.host import HostFacts, KvmProbe
from colmeia.model.vm import Aio, Died, Disk, DiskBus, Firmware, Forward, Machine, Nic, VmSpec, VmState

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [pytest.mark.anyio, pytest.mark.skipif(QEMU is None, reason="QEMU is not installed")]
IS_ROOT = os.geteuid() == 0
FACTS = HostFacts(
    cpus=os.cpu_count() or 1,
    memory_bytes=1 << 34,
    qemu_binary=QEMU or "",
    qemu_version=(7, 2, 0),
    qemu_machine="q35",
    kvm=KvmProbe(present=False, usable=False, reason="not asked for here"),
    is_root=IS_ROOT,
    tsc_khz=1_000_000,
)
VM = new_id()
UID = 64_777
DEADLINE_S = 30


class Host:
    """A run folder and a log folder, and any number of daemons' engines on them, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exits: list[tuple[str, Died, bool]] = []
        self.states: list[VmState] = []
        self.engines: list[QemuEngine] = []

    def engine(self, facts: HostFacts = FACTS) -> QemuEngine:
        engine = QemuEngine(
            facts,
            self.folder / "run",
            self.folder / "log",
            lambda vm_id, died, expected: self.exits.append((vm_id, died, expected)),
            lambda vm_id, state: self.states.append(state),
        )
        self.engines.append(engine)
        return engine

    def request(self, spec: VmSpec | None = None, **more: object) -> LaunchRequest:
        values = {"vm_id": VM, "name": "web1", "uid": UID, "spec": spec or small(), **more}
        return LaunchRequest.model_validate(values)

    def disk(self, name: str, backing: str | None = None) -> str:
        path = self.folder / f"{name}.qcow2"
        base = ["-b", backing, "-F", "qcow2"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, str(path), "64M"], check=True)
        path.chmod(0o600)
        return str(path)

    @property
    def run(self) -> Path:
        return self.folder / "run" / VM


def small(**more: object) -> VmSpec:
    return VmSpec.model_validate({"memory": 64 * MIB, "nics": (), **more})


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    yield host
    for engine in host.engines:
        await engine.aclose()
    last = host.engine()
    for entry in (tmp_path / "run").iterdir() if (tmp_path / "run").exists() else ():
        await last.kill(entry.name)
    await last.aclose()
    assert process.find(host.run, VM) is None


async def eventually(condition: Callable[[], Awaitable[bool] | bool], deadline_s: float = 15) -> None:
    """Wait for a condition of the outside world that nothing announces."""
    with anyio.fail_after(deadline_s):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await anyio.sleep(0.01)


async def read_until(stream: ByteStream, mark: bytes) -> bytes:
    seen = b""
    with anyio.fail_after(15):
        while mark not in seen:
            data = await stream.receive()
            assert data, f"the stream ended after {seen!r}"
            seen += data
    return seen


async def test_a_started_vm_runs_is_paused_resumed_reset_and_killed(host: Host) -> None:
    engine = host.engine()
    runtime = await engine.start(host.request(), deadline_s=DEADLINE_S)
    assert await engine.observe(VM) == (VmState.RUNNING, runtime.pid)
    await engine.pause(VM)
    assert (await engine.observe(VM)).state is VmState.PAUSED
    await engine.reset(VM)
    await engine.resume(VM)
    assert (await engine.observe(VM)).state is VmState.RUNNING
    assert host.states == [VmState.PAUSED, VmState.RUNNING]
    await engine.press_power_button(VM)
    assert not await engine.wait_gone(VM, timeout_s=0.05)
    await engine.kill(VM)
    assert await engine.observe(VM) == (VmState.STOPPED, None)
    assert await engine.wait_gone(VM, timeout_s=0)
    [(vm_id, died, expected)] = host.exits
    assert (vm_id, died.exit_code, expected) == (VM, -9, True)


async def test_killing_takes_less_than_fifty_milliseconds(host: Host) -> None:
    engine = host.engine()
    took = []
    for _ in range(3):
        await engine.start(host.request(), deadline_s=DEADLINE_S)
        before = anyio.current_time()
        await engine.kill(VM)
        took.append(anyio.current_time() - before)
    assert min(took) < 0.05


@pytest.mark.skipif(not IS_ROOT, reason="only root can drop privileges")
async def test_qemu_has_a_user_of_its_own_and_no_privileges(host: Host) -> None:
    runtime = await host.engine().start(host.request(), deadline_s=DEADLINE_S)
    lines = Path(f"/proc/{runtime.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(UID)}
    assert status["Groups"].split() == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
    assert host.run.stat().st_mode & 0o777 == 0o700
    assert host.run.stat().st_uid == 0


async def test_starting_twice_at_once_makes_one_process(host: Host) -> None:
    engine = host.engine()
    first, second = await asyncio.gather(
        engine.start(host.request(), deadline_s=DEADLINE_S), engine.start(host.request(), deadline_s=DEADLINE_S)
    )
    assert first == second
    third = await host.engine().start(host.request(), deadline_s=DEADLINE_S)  # another daemon that knows nothing
    assert third == first


async def test_a_new_daemon_adopts_what_runs_with_its_choices(host: Host) -> None:
    first = host.engine()
    runtime = await first.start(host.request(), deadline_s=DEADLINE_S)
    await first.pause(VM)
    await first.aclose()
    second = host.engine()
    assert await second.adopt(VM) == (VmState.PAUSED, runtime.pid)
    assert await second.start(host.request(), deadline_s=DEADLINE_S) == runtime
    await second.resume(VM)
    await second.kill(VM)
    assert [expected for _, _, expected in host.exits] == [True]


async def test_a_qemu_whose_daemon_died_before_noting_its_pid_is_found(host: Host) -> None:
    first = host.engine()
    runtime = await first.start(host.request(), deadline_s=DEADLINE_S)
    await first.aclose()
    (host.run / "pid").unlink()
    (host.run / "runtime.json").unlink()
    second = host.engine()
    assert await second.adopt(VM) == (VmState.RUNNING, runtime.pid)


async def test_a_reused_pid_is_never_taken_for_ours(host: Host) -> None:
    host.run.mkdir(parents=True)
    (host.run / "pid").write_text(f"{os.getpid()} 1\n")
    engine = host.engine()
    assert await engine.adopt(VM) == (VmState.STOPPED, None)
    await engine.kill(VM)  # this very process would be dead


async def test_a_lock_that_nobody_can_explain_refuses_the_start(host: Host) -> None:
    host.run.mkdir(parents=True)
    with (host.run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Conflict) as caught:
            await host.engine().start(host.request(), deadline_s=DEADLINE_S)
    assert caught.value.code == "vm_locked"


async def test_a_killed_qemu_is_reported_as_a_crash_with_its_signal(host: Host) -> None:
    engine = host.engine()
    runtime = await engine.start(host.request(), deadline_s=DEADLINE_S)
    assert runtime.pid is not None
    os.kill(runtime.pid, signal.SIGKILL)
    assert await engine.wait_gone(VM, timeout_s=5)
    [(_, died, expected)] = host.exits
    assert (died.reason, died.exit_code, expected) == ("killed by signal 9 (SIGKILL)", -9, False)
    with pytest.raises(Conflict):
        await engine.pause(VM)


async def test_a_qemu_ended_from_outside_is_unexpected_and_keeps_its_last_words(host: Host) -> None:
    engine = host.engine()
    runtime = await engine.start(host.request(), deadline_s=DEADLINE_S)
    assert runtime.pid is not None
    os.kill(runtime.pid, signal.SIGTERM)
    assert await engine.wait_gone(VM, timeout_s=5)
    [(_, died, expected)] = host.exits
    assert (died.reason, died.exit_code, expected) == ("ended by a signal from outside", 0, False)
    assert "terminating on signal 15" in died.log_tail[-1]


async def test_a_start_that_fails_says_why_and_leaves_no_process(host: Host) -> None:
    engine = host.engine()
    with pytest.raises(Unavailable) as caught:
        await engine.start(host.request(small(cpu_model="no-such-cpu")), deadline_s=DEADLINE_S)
    assert caught.value.code == "qemu_exited"
    assert "no-such-cpu" in caught.value.message
    assert host.exits == []
    assert await engine.observe(VM) == (VmState.STOPPED, None)


async def test_a_start_that_does_not_answer_in_time_leaves_no_process(host: Host) -> None:
    with pytest.raises(Unavailable) as caught:
        await host.engine().start(host.request(), deadline_s=0.001)
    assert caught.value.code == "start_timeout"
    assert process.find(host.run, VM) is None


async def test_a_missing_qemu_or_disk_is_named(host: Host) -> None:
    facts = FACTS.model_copy(update={"qemu_binary": "/nonexistent/qemu", "is_root": False})
    with pytest.raises(Unavailable) as caught:
        await host.engine(facts).start(host.request(), deadline_s=DEADLINE_S)
    assert caught.value.code == "qemu_missing"
    disk = Disk(name="root", size=64 * MIB)
    lost = OpenDisk(disk=disk, source=BlockSource(path="/nonexistent/d", format=BlockFormat.RAW))
    with pytest.raises(Unavailable) as caught:
        await host.engine().start(host.request(small(disks=(disk,)), disks=(lost,)), deadline_s=DEADLINE_S)
    assert "/nonexistent/d" in caught.value.message


async def test_a_forward_of_a_port_in_use_is_refused_before_anything_starts(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = Forward(host_port=taken.getsockname()[1], guest_port=22)
        with pytest.raises(Conflict) as caught:
            await host.engine().start(host.request(small(nics=(Nic(forwards=(forward,)),))), deadline_s=DEADLINE_S)
    assert caught.value.code == "port_in_use"
    assert process.find(host.run, VM) is None


async def test_a_forward_reaches_qemu(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spec = small(nics=(Nic(forwards=(Forward(host_port=port, guest_port=22),)),))
    await host.engine().start(host.request(spec), deadline_s=DEADLINE_S)
    async with await anyio.connect_tcp("127.0.0.1", port):
        pass


@pytest.mark.parametrize("bus", DiskBus)
@pytest.mark.parametrize("aio", [Aio.THREADS, Aio.IO_URING])
async def test_private_disks_and_backing_files_open_by_descriptor(host: Host, bus: DiskBus, aio: Aio) -> None:
    if aio is Aio.IO_URING and Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() != "0":
        pytest.skip("io_uring is disabled here")
    base = host.disk("base")
    top = host.disk("top", base)
    disk = Disk(name="root", size=64 * MIB, bus=bus, aio=aio)
    backing = BlockSource(path=base, format=BlockFormat.QCOW2, read_only=True)
    source = BlockSource(path=top, format=BlockFormat.QCOW2, backing=backing)
    engine = host.engine(FACTS.model_copy(update={"io_uring": True}))
    request = host.request(small(disks=(disk,)), disks=(OpenDisk(disk=disk, source=source),), seed=base)
    runtime = await engine.start(request, deadline_s=DEADLINE_S)
    assert runtime.aio == {"root": aio}
    with pytest.raises(ColmeiaError) as caught:  # a second VM on the same disk
        other = request.model_copy(update={"vm_id": "f" * 16})
        await engine.start(other, deadline_s=DEADLINE_S)
    assert caught.value.code == "disk_in_use"


@pytest.mark.parametrize("firmware", [Firmware.UEFI, Firmware.BIOS])
async def test_firmware_starts(host: Host, firmware: Firmware) -> None:
    code = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
    if firmware is Firmware.UEFI and not code.exists():
        pytest.skip("OVMF is not installed")
    variables = host.folder / "vars.fd"
    if firmware is Firmware.UEFI:
        shutil.copy("/usr/share/OVMF/OVMF_VARS_4M.fd", variables)
    engine = host.engine(FACTS.model_copy(update={"ovmf_code": str(code)}))
    request = host.request(small(firmware=firmware), uefi_vars=str(variables), paused=True)
    assert (await engine.start(request, deadline_s=DEADLINE_S)).firmware is firmware
    assert (await engine.observe(VM)).state is VmState.PAUSED


async def test_a_microvm_starts_and_has_no_screen(host: Host) -> None:
    engine = host.engine()
    disk = Disk(name="root", size=64 * MIB)
    source = BlockSource(path=host.disk("root"), format=BlockFormat.QCOW2)
    spec = small(machine=Machine.MICROVM, disks=(disk,), nics=(Nic(),))
    await engine.start(host.request(spec, disks=(OpenDisk(disk=disk, source=source),)), deadline_s=DEADLINE_S)
    assert (await engine.observe(VM)).state is VmState.RUNNING
    with pytest.raises(Unsupported) as caught:
        await engine.screenshot(VM)
    assert caught.value.code == "no_display"


async def test_screenshot_is_png_and_vnc_greets_every_viewer(host: Host) -> None:
    engine = host.engine()
    await engine.start(host.request(), deadline_s=DEADLINE_S)
    assert (await engine.screenshot(VM)).startswith(b"\x89PNG\r\n")
    for _ in range(2):
        viewer = await engine.open_vnc(VM)
        assert await read_until(viewer, b"\n") == b"RFB 003.008\n"
        await viewer.send(b"RFB 003.008\n")
        assert await read_until(viewer, b"\x01\x01")  # one security type: none
        await viewer.aclose()
    assert not [path.name for path in host.run.iterdir() if "vnc" in path.name]


async def test_all_viewers_of_the_serial_console_see_the_same_and_the_log_keeps_it(host: Host) -> None:
    engine = host.engine()
    await engine.start(host.request(paused=True), deadline_s=DEADLINE_S)
    first = await connected_viewer(host)
    second = await engine.open_serial(VM)
    await write_to_com1(host, b"hello")
    assert (await read_until(first, b"hello")).endswith(b"hello")
    assert await read_until(second, b"hello") == b"hello"
    await first.aclose()
    await write_to_com1(host, b"again")
    assert await read_until(second, b"again") == b"again"
    await second.aclose()
    third = await connected_viewer(host)
    await third.send(b"typed")
    assert engine.serial_log(VM).read_bytes().strip(b".") == b"helloagain"
    await engine.kill(VM)
    while await third.receive():
        pass
    with pytest.raises(Unavailable):
        await third.send(b"x")
    await third.aclose()


async def connected_viewer(host: Host) -> ByteStream:
    """Open the console and wait, by writing dots, until QEMU has taken the connection."""
    viewer = await host.engines[0].open_serial(VM)

    async def sees_a_dot() -> bool:
        await write_to_com1(host, b".")
        with anyio.move_on_after(0.1):
            return bool(await viewer.receive())
        return False

    await eventually(sees_a_dot)
    return viewer


async def write_to_com1(host: Host, text: bytes) -> None:
    """Write to the guest's serial port as its CPU would, through QEMU's monitor: no operating system is needed."""
    engine = host.engines[0]
    for byte in text:
        line = f"o /b 0x3f8 {byte}"
        await engine._machines[VM].session.execute("human-monitor-command", {"command-line": line})


async def test_a_dropped_qmp_session_is_opened_again(host: Host) -> None:
    engine = host.engine()
    runtime = await engine.start(host.request(), deadline_s=DEADLINE_S)
    session = engine._machines[VM].session
    client = session._client
    assert client._writer is not None
    client._writer.transport.abort()
    await eventually(lambda: session._client is not client)
    await engine.pause(VM)
    assert await engine.observe(VM) == (VmState.PAUSED, runtime.pid)
    assert host.exits == []


async def test_forget_removes_the_folders_of_a_stopped_vm_only(host: Host) -> None:
    engine = host.engine()
    await engine.start(host.request(), deadline_s=DEADLINE_S)
    with pytest.raises(Conflict):
        await engine.forget(VM)
    await engine.kill(VM)
    await engine.forget(VM)
    await engine.forget(VM)
    assert not host.run.exists()
    assert not engine.serial_log(VM).parent.exists()


async def test_ten_starts_at_once_all_answer(host: Host) -> None:
    engine = host.engine()
    ids = [f"{number:016x}" for number in range(10)]
    requests = [host.request(vm_id=vm_id, paused=True) for vm_id in ids]
    runtimes = await asyncio.gather(*(engine.start(request, deadline_s=DEADLINE_S) for request in requests))
    assert len({runtime.pid for runtime in runtimes}) == 10
    await asyncio.gather(*(engine.kill(vm_id) for vm_id in ids))
    assert all(expected for _, _, expected in host.exits)


async def test_the_agent_of_a_guest_without_one_is_silent(host: Host) -> None:
    engine = host.engine()
    await engine.start(host.request(), deadline_s=DEADLINE_S)
    before = anyio.current_time()
    with pytest.raises(Conflict) as caught:
        await engine.agent(VM, "guest-ping", None, timeout_s=0.3)
    assert caught.value.code == "agent_silent"
    assert anyio.current_time() - before < 2


@contextlib.asynccontextmanager
async def guest_that_answers(host: Host, answer: Callable[[dict[str, object]], bytes]) -> AsyncIterator[None]:
    """Stand in for the guest's end of the agent channel, with a process's own socket at the same path."""
    path = host.run / "agent.sock"
    await to_thread.run_sync(path.unlink)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while line := await reader.readline():
                writer.write(answer(json.loads(line.lstrip(b"\xff"))))
                await writer.drain()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


def synced(request: dict[str, object], reply: bytes) -> bytes:
    if request["execute"] != "guest-sync-delimited":
        return reply
    arguments = request["arguments"]
    assert isinstance(arguments, dict)
    late = b'{"return": "a late answer to an earlier question"}\n'
    return late + b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (b"not json\n", "agent_garbage"),
        (b"[" * 100_000 + b"\n", "agent_garbage"),
        (b"17\n", "agent_garbage"),
        (b"x" * (26 << 20), "agent_garbage"),
        (b"", "agent_silent"),
        (b'{"error": {"class": "CommandNotFound", "desc": "no"}}\n', "agent_command"),
        (b'{"error": {"class": "GenericError", "desc": "no"}}\n', "agent_refused"),
    ],
    ids=["text", "deep", "number", "endless", "nothing", "unknown", "refused"],
)
async def test_whatever_the_agent_sends_becomes_an_error(host: Host, reply: bytes, code: str) -> None:
    engine = host.engine()
    await engine.start(host.request(), deadline_s=DEADLINE_S)
    async with guest_that_answers(host, lambda request: synced(request, reply)):
        with pytest.raises(ColmeiaError) as caught:
            await engine.agent(VM, "guest-info", {"a": 1}, timeout_s=1 if not reply else 10)
    assert caught.value.code == code


async def test_the_agent_skips_late_answers_and_takes_one_command_at_a_time(host: Host) -> None:
    engine = host.engine()
    await engine.start(host.request(), deadline_s=DEADLINE_S)
    async with guest_that_answers(host, lambda request: synced(request, b'{"return": {"pid": 7}}\n')):
        answers = await asyncio.gather(*(engine.agent(VM, "guest-exec", {}, timeout_s=10) for _ in range(5)))
    assert answers == [{"pid": 7}] * 5


def test_a_log_is_cut_to_its_end_and_short_ones_stay(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"a" * 100 + b"end")
    with log.open("ab") as writer:
        process.trim(log, limit=200, keep=3)
        assert log.stat().st_size == 103
        process.trim(log, limit=50, keep=3)
        writer.write(b"+")
    assert log.read_bytes() == b"end+"
    process.trim(tmp_path / "none", limit=1, keep=1)
