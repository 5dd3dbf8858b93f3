"""A real daemon in folders of its own, that a test may kill and start again."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

UID_BASE = 700_000 + os.getpid() % 10_000 * 100
"""Host users of the VMs that this test process makes: what runs under them is ours, and nobody else's."""


def wait_until(what: str, look: Callable[[], T | None], *, timeout_s: float = 60.0) -> T:
    """Return the first true answer of ``look``. Raises AssertionError that names ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.01)


class LocalConnection(http.client.HTTPConnection):
    """HTTP over the daemon's local socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class ApiAnswer(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


class Daemon:
    """`colmeia serve` on a state folder. The folder outlives the process, so a test can kill and start again."""

    def __init__(self, folder: Path, *, listen: str = "", **settings: str) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.run = folder / "run"
        self.socket = self.run / "api.sock"
        self.log = folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("COLMEIA_")} | {
            "COLMEIA_STATE_DIR": str(self.state),
            "COLMEIA_RUN_DIR": str(self.run),
            "COLMEIA_LISTEN": listen,
            "COLMEIA_UID_BASE": str(UID_BASE),
            "COLMEIA_SERVER": f"unix://{self.socket}",
            **{f"COLMEIA_{key.upper()}": value for key, value in settings.items()},
        }

    def start(self, *, timeout_s: float = 30) -> "Daemon":
        """Start it and return when it answers."""
        with self.log.open("ab") as log:
            # setpriv: if the test process is killed, the daemon goes too
            self.process = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    sys.executable,
                    "-c",
                    "from colmeia.cli.main import main; main()",
                    "serve",
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until("the daemon answers", self._answers, timeout_s=timeout_s)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}")
        with suppress(OSError, http.client.HTTPException):
            return bool(self.get("/healthz")["status"] == "ok")
        return False

    def kill(self) -> None:
        """End it as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as the administrator would; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        """End every VM, then the daemon: nothing is left."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        for vm in self.get("/v1/vms")["items"]:
            with suppress(ApiAnswer):
                self.done(self.delete(f"/v1/vms/{vm['id']}?force=true"))
        self.stop()

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float = 120, **headers: str) -> Any:
        """Return the parsed answer (JSON, or bytes). Raises ApiAnswer for an error."""
        connection = LocalConnection(self.socket, timeout_s)
        try:
            sent = None if body is None else json.dumps(body)
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, path, sent, {"Content-Type": "application/json", **named})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        is_json = "json" in (response.headers.get("Content-Type") or "")
        answer = json.loads(content) if is_json and content else content
        if response.status >= 400:
            raise ApiAnswer(response.status, answer)
        return answer

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Any = None, *, idempotency_key: str = "") -> Any:
        headers = {"Idempotency_Key": idempotency_key} if idempotency_key else {}
        return self.call("POST", path, body, timeout_s=120, **headers)

    def delete(self, path: str) -> Any:
        return self.call("DELETE", path)

    def ended(self, operation: Any, *, timeout_s: float = 120) -> Any:
        """Wait for the end of an operation and return it, however it ended."""

        def look() -> Any:
            found = self.get(f"/v1/operations/{operation['id']}?wait=20")
            return found if found["finished_at"] else None

        return wait_until(f"{operation['kind']} ends", look, timeout_s=timeout_s)

    def done(self, operation: Any, *, timeout_s: float = 120) -> Any:
        """Wait for an operation that must succeed."""
        ended = self.ended(operation, timeout_s=timeout_s)
        assert ended["state"] == "done", ended
        return ended

    def vm(self, name: str) -> Any:
        return self.get(f"/v1/vms/{name}")

    def create_vm(self, name: str, *, start: bool = False, **spec: Any) -> Any:
        """Create a VM and return it when it exists (and runs)."""
        self.done(self.post("/v1/vms", {"name": name, "spec": spec, "start": start}))
        return self.vm(name)
