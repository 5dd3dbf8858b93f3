"""Programs end with the call that started them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from colmeia.host.process import run
from colmeia.model.errors import Unavailable

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def wait_dead(pid: int) -> None:
    with anyio.fail_after(5):
        while is_alive(pid):
            await anyio.sleep(0.01)


async def wait_pids(file: Path, count: int) -> list[int]:
    with anyio.fail_after(10):
        while not file.exists() or len(file.read_text().split()) < count:
            await anyio.sleep(0.01)
    return [int(word) for word in file.read_text().split()]


async def test_output_input_and_exit_code_come_back() -> None:
    done = await run(["sh", "-c", "cat; echo warn >&2; exit 3"], timeout_s=10, input=b"hello" * 50_000, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"hello" * 50_000, b"warn\n")


async def test_a_child_that_does_not_read_its_input_is_no_error() -> None:
    assert (await run(["true"], timeout_s=10, input=b"x" * 1_000_000)).returncode == 0


async def test_the_environment_is_added_to_and_messages_are_english() -> None:
    done = await run(["sh", "-c", "echo $ADDED $LC_ALL"], timeout_s=10, env={"ADDED": "yes"})
    assert done.stdout == b"yes C\n"


async def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable) as caught:
        await run(["no-such-program"], timeout_s=10)
    assert caught.value.code == "program_missing"
    assert "apt-get install" in caught.value.hint


async def test_a_failure_tells_the_last_words() -> None:
    with pytest.raises(Unavailable) as caught:
        await run(["sh", "-c", "echo first; echo the reason >&2; exit 7"], timeout_s=10)
    assert caught.value.code == "program_failed"
    assert "exit code 7" in caught.value.message and "the reason" in caught.value.message


async def test_progress_arrives_while_the_program_runs(tmp_path: Path) -> None:
    seen: list[bytes] = []
    go = tmp_path / "go"

    def on_output(piece: bytes) -> None:
        seen.append(piece)
        go.touch()

    script = f'echo one; while [ ! -e "{go}" ]; do sleep 0.01; done; echo two'
    await run(["sh", "-c", script], timeout_s=10, on_output=on_output)
    assert b"".join(seen) == b"one\ntwo\n" and len(seen) > 1


async def test_a_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(Unavailable) as caught:
        await run(["sh", "-c", f"echo $$ >{pids}; sleep 60 & echo $! >>{pids}; wait"], timeout_s=0.5)
    assert caught.value.code == "program_timeout"
    for pid in await wait_pids(pids, 2):
        await wait_dead(pid)


async def test_a_cancel_kills_the_whole_group_before_it_returns(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run(["sh", "-c", f"echo $$ >{pids}; sleep 60 & echo $! >>{pids}; wait"], timeout_s=60))
        child, grandchild = await wait_pids(pids, 2)
        tasks.cancel_scope.cancel()
    assert not Path(f"/proc/{child}").exists()  # dead and reaped
    await wait_dead(grandchild)


async def test_a_grandchild_that_keeps_the_pipes_does_not_hold_the_call() -> None:
    begun = time.monotonic()
    done = await run(["sh", "-c", "sleep 60 & echo over"], timeout_s=30)
    assert done.stdout == b"over\n"
    assert time.monotonic() - begun < 20


async def test_the_child_dies_with_the_daemon(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import anyio; from colmeia.host.process import run;"
        f"anyio.run(lambda: run(['sh', '-c', 'echo $$ >{pids}; exec sleep 60'], timeout_s=60))"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"})
    try:
        (child,) = await wait_pids(pids, 1)
    finally:
        daemon.kill()
        daemon.wait()
    await wait_dead(child)
