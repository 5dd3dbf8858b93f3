"""The whole way of a user: build a Debian image, start it with an ssh key, log in, and run a command by its agent."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colmeia.testing.daemon import ApiAnswer, Daemon, wait_until

BUILD_S = 1500
BOOT_S = 600  # under TCG; with KVM it is seconds


def colmeia(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from colmeia.cli.main import main; main()", *arguments]
    return subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=120, check=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.timeout(BUILD_S + 2 * BOOT_S)
def test_a_debian_guest_is_reached_by_ssh_and_by_its_agent(daemon: Daemon, tmp_path: Path) -> None:
    daemon.done(daemon.post("/v1/images/build", {"name": "debian", "recipe": "debian/12"}), timeout_s=BUILD_S)
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    port = free_port()
    made = colmeia(
        daemon, "vm", "create", "web1", "--image", "debian", "--memory", "768MiB", "--cpus", "2",
        "--forward", f"{port}:22", "--user", "ana", "--ssh-key", f"{key}.pub", "--start",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr

    def ssh(*command: str) -> str | None:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "ConnectTimeout=10")
        words = [word for option in options for word in ("-o", option)]
        argv = ["ssh", "-q", *words, "-i", str(key), "-p", str(port), "ana@127.0.0.1", *command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    assert wait_until("ssh logs in", lambda: ssh("hostname"), timeout_s=BOOT_S) == "web1"
    assert ssh("sudo", "-n", "id", "-un") == "root"

    def by_agent() -> Any:
        try:
            return daemon.post("/v1/vms/web1/exec", {"command": ["uname", "-a"]})
        except ApiAnswer:
            return None

    wait_until("the agent answers", by_agent, timeout_s=BOOT_S)
    answer = colmeia(daemon, "vm", "exec", "web1", "--", "uname", "-a")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Linux web1 ")
    failed = colmeia(daemon, "vm", "exec", "web1", "--", "sh", "-c", "exit 7")
    assert failed.returncode == 7
    stopped = daemon.done(daemon.post("/v1/vms/web1/stop", {"timeout_s": 120}), timeout_s=180)
    assert "did not power off" not in stopped["message"]
