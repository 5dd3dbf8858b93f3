"""Fixtures of every test: a real daemon on demand, the tiny guest, and a check that nothing is left behind."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from colmeia.testing.daemon import UID_BASE, Daemon

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "packages"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _traces() -> dict[str, set[str]]:
    """What a test could leave behind: processes of ours, namespaces, taps, mounts, descriptors."""
    run_netns = Path("/run/netns")
    return {
        "processes": set(_own_processes()),
        "namespaces": set(os.listdir(run_netns)) if run_netns.is_dir() else set(),
        "taps": {name for name in os.listdir("/sys/class/net") if name.startswith("tap")},
        "mounts": {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()},
        "descriptors": {
            f"{name} {target}"
            for name in os.listdir("/proc/self/fd")
            if (target := _target(name)) and target.startswith(("socket:", "/")) and "pytest" not in target
        },
    }


def _own_processes() -> Iterator[str]:
    """Our children, and whatever runs under a host user of our VMs: other test runs on this machine are not ours."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,uid=,stat=,comm="], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        pid, parent, uid, state, name = line.split(None, 4)
        if state.startswith("Z"):
            continue  # dead: an orphan waits for PID 1, which may take its time
        if name != "ps" and (int(parent) == os.getpid() or UID_BASE <= int(uid) < UID_BASE + 100):
            yield f"{pid} {name}"


def _target(descriptor: str) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, namespace, tap, mount or descriptor behind."""
    for name in ("tiny_image", "module_daemon", "tiny_guest"):  # session and module fixtures are not the test's own
        if name in request.fixturenames:
            request.getfixturevalue(name)
    before = _traces()
    yield
    after = _traces()
    left = {kind: sorted(found - before[kind]) for kind, found in after.items() if found - before[kind]}
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def tiny_image() -> Path:
    """The folder of the tiny guest image, built once per checkout."""
    import anyio

    from colmeia.storage.build_tiny import build_tiny

    folder = ROOT / ".cache" / "tiny"
    if not (folder / "kernel").exists():
        folder.mkdir(parents=True, exist_ok=True)
        anyio.run(build_tiny, folder, CACHE, lambda _share, _message: None)
    return folder


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own; everything it made is gone afterwards."""
    made = Daemon(tmp_path, cache_dir=str(CACHE))
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that the tests of a module share, with the image `tiny`."""
    made = Daemon(tmp_path_factory.mktemp("daemon"), cache_dir=str(CACHE))
    made.start()
    made.done(made.post("/v1/images/build", {"name": "tiny", "recipe": "tiny"}))
    yield made
    made.close()
