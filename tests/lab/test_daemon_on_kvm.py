"""The whole product on a host whose KVM works: `auto` chooses it, and the doctor says so."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_auto_starts_a_vm_on_kvm_that_reaches_its_user_space(daemon: Daemon) -> None:
    shutil.copytree(PACKAGES, daemon.state / "cache" / "tiny", dirs_exist_ok=True)
    building = daemon.post("/v1/images/build", {"name": "tiny", "recipe": "tiny"})
    daemon.done(building, timeout_s=400)
    vm = daemon.create_vm("web1", start=True, disks=[{"image": "tiny"}])
    assert vm["runtime"]["accelerator"] == "kvm", vm["runtime"]
    assert not [warning for warning in vm["runtime"]["warnings"] if "TCG" in warning]

    def is_ready() -> bool:
        return b"COLMEIA-GUEST-READY" in daemon.get("/v1/vms/web1/logs")

    wait_until("the guest reaches its user space", is_ready, timeout_s=120)
