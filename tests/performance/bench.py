"""What SPECIFICATION.md promises, measured beside a bare, lean QEMU in the same run.

Prints medians and ratios; it judges but never fails on time, because a time means little on a loaded host: the load
average stands above and below the table. It refuses nothing and leaves nothing behind. Run it as root: `make bench`.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colmeia.testing.daemon import Daemon, wait_until

ROUNDS = 9
MANY = 40
LISTED = 1000
READY = b"COLMEIA-GUEST-READY"
GUEST = {"memory": "160MiB", "disks": [{"image": "tiny"}]}
BOOT_S = 300
IDLE_S = 2  # the server hangs up after 5
CACHE = Path(__file__).parents[2] / ".cache" / "packages"


@dataclass(frozen=True)
class Row:
    """A promise and what was measured. ``limit`` and ``figure`` share the unit; smaller is better."""

    section: str
    what: str
    figure: float
    limit: float
    unit: str
    bare: str = "-"
    libvirt: str = "-"


@contextmanager
def temporary_daemon(folder: Path) -> Iterator[Daemon]:
    daemon = Daemon(folder, cache_dir=str(CACHE))
    daemon.environment.pop("PYTHONDONTWRITEBYTECODE", None)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()


class Caller:
    """One kept-alive connection to the daemon's socket, cheap enough not to be what is measured."""

    def __init__(self, daemon: Daemon) -> None:
        self._path = str(daemon.socket)
        self._connect()

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()
        self._socket.close()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(self._path)
        self._file = self._socket.makefile("rb")
        self._used = time.monotonic()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        if time.monotonic() - self._used > IDLE_S:
            self.__exit__()
            self._connect()
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = int(self._file.readline().split()[1])
        length = 0
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        answer = self._file.read(length)
        self._used = time.monotonic()
        assert status < 400, (method, path, answer)
        return json.loads(answer)

    def act(self, method: str, path: str, body: object = None) -> None:
        """Ask for an operation and return when it is done."""
        operation = self.ask(method, path, body)
        ended = self.ask("GET", f"/v1/operations/{operation['id']}?wait=120")
        assert ended["state"] == "done", ended


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def wait_ready(log: Path, times: int) -> None:
    wait_until("the guest boots", lambda: log.exists() and log.read_bytes().count(READY) >= times, timeout_s=BOOT_S)


# ── the baseline ─────────────────────────────────────────────────────────────────────────────────────────────────


class BareQemu:
    """The same guest under `qemu-system-x86_64` alone: nothing that the guest does not need."""

    def __init__(self, folder: Path, daemon: Daemon, runtime: dict[str, Any]) -> None:
        image = next(daemon.state.rglob("kernel")).parent
        words = Path(f"/proc/{runtime['pid']}/cmdline").read_text().split("\0")
        kernel_arguments = words[words.index("-append") + 1]
        self.log = folder / "bare.log"
        self._qmp = folder / "bare.qmp"
        self._disk = folder / "bare.qcow2"
        base = next(path for path in image.iterdir() if path.name.startswith("disk"))
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(self._disk)]
        subprocess.run(make, check=True)
        self.argv = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35,usb=off,vmport=off", "-accel", f"{runtime['accelerator']}", "-cpu", runtime["cpu_model"],
            "-m", "160M", "-kernel", str(image / "kernel"), "-initrd", str(image / "initrd"),
            "-append", kernel_arguments,
            "-blockdev", f"qcow2,node-name=d,file.driver=file,file.aio={runtime['aio']['root']},"
            f"file.filename={self._disk}",
            "-device", "virtio-blk-pci,drive=d", "-serial", f"file:{self.log}",
            "-qmp", f"unix:{self._qmp},server=on,wait=off",
        ]  # fmt: skip

    @contextmanager
    def running(self, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        self._qmp.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        process = subprocess.Popen([*self.argv, *more], stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def boot(self) -> float:
        began = time.perf_counter()
        with self.running():
            wait_ready(self.log, 1)
            return time.perf_counter() - began

    def answer(self) -> tuple[float, float]:
        """Return the seconds until QMP greets, and those until it is gone when killed."""
        began = time.perf_counter()
        with self.running("-S") as process:
            wait_until("QEMU listens", self._greeted, timeout_s=30)
            answered = time.perf_counter() - began

            def end() -> None:
                process.kill()
                process.wait()

            return answered, timed(end)

    def _greeted(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as session:
            try:
                session.connect(str(self._qmp))
            except OSError:
                return False
            return b"QMP" in session.recv(4096)


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def start_to_user_space(daemon: Daemon, caller: Caller, bare: BareQemu) -> Iterator[Row]:
    """Boots of both kinds by turns, so that the load of the host falls on both."""
    log = next(daemon.state.rglob(f"{daemon.vm('one')['id']}*/serial.log"), None)
    ours, theirs = [], []
    boots = 0 if log is None else log.read_bytes().count(READY)
    for _round in range(ROUNDS):
        theirs.append(bare.boot())
        began = time.perf_counter()
        caller.ask("POST", "/v1/vms/one/start")
        boots += 1
        log = log or wait_until("the log is there", lambda: next(daemon.state.rglob("*/serial.log"), None))
        wait_ready(log, boots)
        ours.append(time.perf_counter() - began)
        wait_until("it runs", lambda: daemon.vm("one")["state"] == "running")
        caller.act("POST", "/v1/vms/one/stop", {"force": True})
    ratio = statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))
    what = f"POST start -> guest user space, against bare ({statistics.median(ours):.2f} s)"
    baseline = f"{statistics.median(theirs):.2f} s"
    yield Row("start-to-user-space", what, ratio, 1.05, "x", baseline, "1.13-1.20")


def start_and_stop(caller: Caller, bare: BareQemu) -> Iterator[Row]:
    starts, stops, bare_starts, bare_stops = [], [], [], []
    for _round in range(ROUNDS):
        answered, ended = bare.answer()
        bare_starts.append(answered)
        bare_stops.append(ended)
        starts.append(timed(lambda: caller.act("POST", "/v1/vms/one/start", {"paused": True})))
        stops.append(timed(lambda: caller.act("POST", "/v1/vms/one/stop", {"force": True})))
    baseline = f"{statistics.median(bare_starts):.3f} s"
    what = "POST start -> QEMU answers"
    yield Row("start-to-qmp", what, statistics.median(starts), 0.10, "s", baseline, "0.252-0.296")
    baseline = f"{statistics.median(bare_stops):.3f} s"
    yield Row("force-stop", "force stop", statistics.median(stops), 0.05, "s", baseline, "0.230")


def forty(daemon: Daemon) -> Iterator[Row]:
    """Starts of 40 at once, and what the daemon and the command line cost while they are there."""
    names = [f"many-{number}" for number in range(MANY)]
    callers = [Caller(daemon) for _name in names]
    with ThreadPoolExecutor(MANY) as pool:

        def all_do(method: str, action: str, body: object) -> None:
            paths = [f"/v1/vms/{name}{action}" for name in names]
            list(pool.map(lambda caller, path: caller.act(method, path, body), callers, paths))

        def create(caller: Caller, name: str) -> None:
            caller.act("POST", "/v1/vms", {"name": name, "spec": GUEST})

        list(pool.map(create, callers, names))
        starts, memory = [], []
        for _round in range(ROUNDS):
            starts.append(timed(lambda: all_do("POST", "/start", {"paused": True})))
            memory.append(daemon_pss_mib(daemon))
            if _round < ROUNDS - 1:
                all_do("POST", "/stop", {"force": True})
        yield Row("start-40", f"{MANY} VMs started at once", statistics.median(starts), 3, "s", "-", "4.7-5.0")
        what = f"daemon PSS with {MANY} running"
        yield Row("daemon-memory", what, statistics.median(memory), 120, "MiB", "-", "33")
        yield command_line(daemon)
        all_do("DELETE", "?force=true", None)
    for caller in callers:
        caller.__exit__()


def daemon_pss_mib(daemon: Daemon) -> float:
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def command_line(daemon: Daemon) -> Row:
    program = str(Path(sys.executable).with_name("colmeia"))

    def run(*words: str) -> None:
        subprocess.run([program, *words], env=daemon.environment, check=True, stdout=subprocess.DEVNULL)

    run("vm", "list")  # the first run compiles
    figure = statistics.median(timed(lambda: run("vm", "list")) for _round in range(ROUNDS))
    bare = statistics.median(timed(lambda: subprocess.run([sys.executable, "-c", ""])) for _round in range(ROUNDS))
    return Row("cli-list", f"colmeia vm list, {MANY} VMs", figure, 0.25, "s", f"python {bare:.3f} s", "0.034")


def doctor(daemon: Daemon) -> Row:
    program = str(Path(sys.executable).with_name("colmeia"))

    def run() -> None:
        subprocess.run([program, "doctor"], env=daemon.environment, stdout=subprocess.DEVNULL)

    figure = statistics.median(timed(run) for _round in range(ROUNDS))
    return Row("doctor", "colmeia doctor", figure, 1, "s")


def list_thousand(folder: Path) -> Row:
    """A daemon of its own, whose database was filled with copies of one VM: creating is not what is measured."""
    folder.mkdir()
    daemon = Daemon(folder, cache_dir=str(CACHE)).start()
    try:
        daemon.create_vm("copied", memory="160MiB")
        daemon.stop()
        _copy_vm(next(daemon.state.glob("*.db*")), LISTED - 1)
        daemon.start()
        with Caller(daemon) as caller:
            assert len(caller.ask("GET", "/v1/vms?limit=1000")["items"]) == LISTED
            figure = statistics.median(
                timed(lambda: caller.ask("GET", "/v1/vms?limit=1000")) * 1000 for _round in range(ROUNDS)
            )
    finally:
        daemon.kill()  # no VM ever ran
    return Row("list-1000", f"GET /v1/vms with {LISTED:,} VMs", figure, 50, "ms", "-", "1.0 (100 VMs)")


def _copy_vm(database: Path, copies: int) -> None:
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    with connection:
        model = dict(connection.execute("SELECT * FROM vms").fetchone())
        for number in range(copies):
            name, vm_id = f"copy-{number:04}", f"{number:016x}"
            document = model["document"].replace(model["id"], vm_id).replace('"copied"', f'"{name}"')
            row = {**model, "id": vm_id, "name": name, "uid": model["uid"] + number + 1, "document": document}
            marks = ",".join("?" * len(row))
            connection.execute(f"INSERT INTO vms ({','.join(row)}) VALUES ({marks})", tuple(row.values()))
    connection.close()


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def show(row: Row) -> None:
    verdict = "met" if row.figure <= row.limit else "MISSED"
    digits = 3 if row.unit in ("s", "x") else 1
    figure, promise = f"{row.figure:.{digits}f} {row.unit}", f"<= {row.limit:g} {row.unit}"
    line = f"{row.section:<20} {row.what:<58} {figure:>10} {promise:>12} {verdict:<7} {row.bare:<15} {row.libvirt}"
    print(line, flush=True)


def load() -> str:
    return " ".join(f"{share:.1f}" for share in os.getloadavg()) + f" on {os.cpu_count()} CPUs"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_signal: sys.exit(143))  # so that also then everything is cleaned up
    folder = Path(tempfile.mkdtemp(prefix="colmeia-bench-"))
    folder.chmod(0o755)
    print(f"Medians of {ROUNDS}. Load average before: {load()}.")
    print(
        f"{'section':<20} {'what':<58} {'figure':>10} {'promise':>12} {'':<7} {'bare QEMU':<15} "
        "libvirt 9.0, same kind of machine"
    )
    try:
        (folder / "daemon").mkdir()
        with temporary_daemon(folder / "daemon") as daemon, Caller(daemon) as caller:
            daemon.done(daemon.post("/v1/images/build", {"name": "tiny", "recipe": "tiny"}), timeout_s=300)
            vm = daemon.create_vm("one", start=True, **GUEST)
            bare = BareQemu(folder, daemon, vm["runtime"])
            caller.act("POST", "/v1/vms/one/stop", {"force": True})
            for rows in (start_to_user_space(daemon, caller, bare), start_and_stop(caller, bare), forty(daemon)):
                for row in rows:
                    show(row)
            show(doctor(daemon))
        show(list_thousand(folder / "list"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Load average after: {load()}.")


if __name__ == "__main__":
    main()
