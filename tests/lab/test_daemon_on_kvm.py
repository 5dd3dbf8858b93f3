"""The whole product on a host whose KVM works: `auto` chooses it, and the doctor says so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from colmeia.testing.daemon import Daemon, wait_until

PACKAGES = Path("/var/cache/lab-packages")  # what the tiny guest is built from; the lab has no network


def test_the_doctor_says_kvm_is_usable(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from colmeia.cli.main import main; main()", "doctor", "-o", "json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["kvm"]["verdict"] == "ok", checks["kvm"]
    assert "AMD-V" in checks["cpu"]["finding"]
    assert checks["vhost_net"]["verdict"] == "ok", checks["vhost_net"]


@pytest.fixture
def slow_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with what it needs to build the tiny guest; everything here is 20 times slower than on a real host."""
    shutil.copytree(PACKAGES, tmp_path / "cache" / "tiny")
    made = Daemon(tmp_path, cache_dir=str(tmp_path / "cache"))
    made.start(timeout_s=240)
    yield made
    made.close()


def test_auto_starts_a_vm_on_kvm_that_reaches_its_user_space(slow_daemon: Daemon) -> None:
    daemon = slow_daemon
    daemon.done(daemon.post("/v1/images/build", {"name": "tiny", "recipe": "tiny"}), timeout_s=500)
    vm = daemon.create_vm("web1", start=True, disks=[{"image": "tiny"}])
    assert vm["runtime"]["accelerator"] == "kvm", vm["runtime"]
    assert vm["runtime"]["cpu_model"] == "host"
    assert not [warning for warning in vm["runtime"]["warnings"] if "KVM" in warning]

    log = next((daemon.state / "logs").rglob("serial.log"))  # the file itself: asking the API costs the guest its CPU

    def is_ready() -> bool:
        return b"COLMEIA-GUEST-READY" in log.read_bytes()

    wait_until("the guest reaches its user space", is_ready, timeout_s=240)
