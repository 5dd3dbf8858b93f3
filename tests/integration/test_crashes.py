"""The daemon dies at any moment: VMs never notice, nothing is lost, nothing half-made stays."""

import hashlib
import http.server
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from colmeia.testing.daemon import ApiAnswer, Daemon, wait_until

READY = "COLMEIA-GUEST-READY"
TINY = {"memory": "160MiB", "disks": [{"image": "tiny"}]}


class _SlowFiles(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges, slowly, so that an import can be cut half way."""

    def __init__(self, path: Path, served: list[int], *args: Any) -> None:
        self._path, self._served = path, served
        super().__init__(*args)

    def do_GET(self) -> None:
        content = self._path.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self._served.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", '"one"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        for offset in range(start, len(content), 256 * 1024):
            try:
                self.wfile.write(content[offset : offset + 256 * 1024])
            except OSError:
                return
            time.sleep(0.02)  # the bandwidth of this server, not a wait for something

    def log_message(self, *_arguments: Any) -> None: ...


@contextmanager
def slow_server(path: Path) -> Iterator[tuple[str, list[int]]]:
    served: list[int] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_SlowFiles, path, served))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/disk.raw", served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def uptime_lines(daemon: Daemon, name: str) -> int:
    log: bytes = daemon.get(f"/v1/vms/{name}/logs?lines=100000")
    return log.decode(errors="replace").count(READY)


def test_killed_with_five_vms_and_an_import_half_way(daemon: Daemon, tmp_path: Path) -> None:
    daemon.done(daemon.post("/v1/images/build", {"name": "tiny", "recipe": "tiny"}))
    names = [f"vm{number}" for number in range(5)]
    for name in names:
        daemon.create_vm(name, start=True, **TINY)
    for name in names:
        wait_until(f"{name} boots", lambda name=name: uptime_lines(daemon, name) == 1, timeout_s=120)
    before = {name: daemon.vm(name)["runtime"]["pid"] for name in names}
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(24 * 1024 * 1024))
    sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
    with slow_server(disk) as (url, served):
        wish = {"name": "big", "source": url, "format": "raw", "sha256": sha256}
        operation = daemon.post("/v1/images", wish)
        wait_until(
            "the import is half way",
            lambda: daemon.get(f"/v1/operations/{operation['id']}")["progress"] > 0.2,
        )
        daemon.kill()
        for pid in before.values():
            assert Path(f"/proc/{pid}").exists()
        daemon.start()
        assert {name: daemon.vm(name)["runtime"]["pid"] for name in names} == before
        assert {daemon.vm(name)["state"] for name in names} == {"running"}
        ended = daemon.done(operation)
    assert ended["attempts"] == 2
    assert len(served) >= 2
    assert served[-1] > 0, "the download began again from its start"
    assert daemon.get("/v1/images/big")["sha256"] == sha256
    assert [uptime_lines(daemon, name) for name in names] == [1] * 5, "a guest was booted again"
    for name in names:  # what was adopted obeys
        daemon.done(daemon.post(f"/v1/vms/{name}/pause"))
        daemon.done(daemon.post(f"/v1/vms/{name}/resume"))


def test_a_vm_that_died_while_no_daemon_watched_is_seen(daemon: Daemon) -> None:
    vm = daemon.create_vm("alone", start=True, on_crash="stop", memory="64MiB")
    daemon.kill()
    os.kill(vm["runtime"]["pid"], 9)
    daemon.start()
    found = wait_until("it is seen", lambda: (v := daemon.vm("alone"))["state"] == "crashed" and v)
    assert found["died"]["reason"]


@pytest.mark.parametrize("kind", ["create", "start", "stop", "restart", "delete"])
def test_killed_in_the_middle_of_an_operation(daemon: Daemon, kind: str) -> None:
    """Kill the daemon at several moments of one operation; the next daemon finishes it."""
    moments = random.Random(kind)
    for round_number in range(4):
        name = f"{kind}{round_number}"
        spec = {"memory": "64MiB", "disks": [{"size": "64MiB"}]}
        if kind == "create":
            operation = daemon.post("/v1/vms", {"name": name, "spec": spec, "start": True})
        else:
            daemon.create_vm(name, start=kind != "start", **spec)
            body = {"force": True} if kind in ("stop", "restart") else None
            path = f"/v1/vms/{name}"
            operation = daemon.delete(f"{path}?force=true") if kind == "delete" else daemon.post(f"{path}/{kind}", body)
        time.sleep(moments.uniform(0, 0.12))  # the moment of the crash is what varies
        daemon.kill()
        daemon.start()
        ended = daemon.ended(operation)
        assert ended["state"] == "done", ended
        _check_whole(daemon, name, kind)


def _check_whole(daemon: Daemon, name: str, kind: str) -> None:
    if kind == "delete":
        with pytest.raises(ApiAnswer):
            daemon.vm(name)
        return
    vm = daemon.vm(name)
    assert vm["state"] == ("stopped" if kind == "stop" else "running")
    assert _processes_of(vm["uid"]) == (0 if kind == "stop" else 1), "one VM, one QEMU"


def _processes_of(uid: int) -> int:
    listing = subprocess.run(["ps", "-eo", "uid=,stat="], capture_output=True, text=True, check=True).stdout
    found = (line.split() for line in listing.splitlines())
    return sum(int(owner) == uid and not state.startswith("Z") for owner, state in found)
