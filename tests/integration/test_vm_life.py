"""A VM's life through the API, with the real daemon, QEMU and guest."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import unix_connect

from colmeia.testing.daemon import ApiAnswer, Daemon, wait_until

READY = "COLMEIA-GUEST-READY"
TINY = {"memory": "160MiB", "disks": [{"image": "tiny"}]}


def serial_log(daemon: Daemon, name: str) -> str:
    return daemon.get(f"/v1/vms/{name}/logs?lines=1000").decode(errors="replace")  # type: ignore[no-any-return]


def wait_ready(daemon: Daemon, name: str, times: int = 1) -> None:
    wait_until(f"{name} boots", lambda: serial_log(daemon, name).count(READY) >= times, timeout_s=90)


def refused(daemon: Daemon, method: str, path: str, body: Any = None) -> tuple[int, str]:
    with pytest.raises(ApiAnswer) as caught:
        daemon.call(method, path, body)
    problem = caught.value.body
    assert problem["detail"], problem
    assert problem["hint"], problem
    return caught.value.status, problem["code"]


def test_create_start_pause_resume_reset_stop_delete(module_daemon: Daemon) -> None:
    daemon = module_daemon
    vm = daemon.create_vm("life", **TINY)
    assert (vm["state"], vm["runtime"]["pid"]) == ("stopped", None)
    daemon.done(daemon.post("/v1/vms/life/start"))
    vm = daemon.vm("life")
    assert vm["state"] == "running"
    assert vm["runtime"]["accelerator"] in ("tcg", "kvm")
    assert vm["runtime"]["aio"]["root"] in ("io_uring", "threads")
    if vm["runtime"]["accelerator"] == "tcg":
        assert any("KVM" in warning for warning in vm["runtime"]["warnings"])
    wait_ready(daemon, "life")
    for action, state in (("pause", "paused"), ("resume", "running"), ("reset", "running")):
        daemon.done(daemon.post(f"/v1/vms/life/{action}"))
        assert daemon.vm("life")["state"] == state
    wait_ready(daemon, "life", times=2)
    daemon.done(daemon.post("/v1/vms/life/stop", {"timeout_s": 30}))
    assert daemon.vm("life")["state"] == "stopped"
    assert not Path(f"/proc/{vm['runtime']['pid']}").exists()
    daemon.done(daemon.delete("/v1/vms/life"))
    assert refused(daemon, "GET", "/v1/vms/life") == (404, "vm_not_found")
    left = [str(path) for path in daemon.state.rglob("*") if vm["id"] in path.name]
    left += [str(path) for path in daemon.run.rglob("*") if vm["id"] in path.name]
    assert left == []


def test_qemu_is_unprivileged_and_sandboxed(module_daemon: Daemon) -> None:
    vm = module_daemon.create_vm("confined", start=True, **TINY)
    status = Path(f"/proc/{vm['runtime']['pid']}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(vm["uid"])] * 4
    assert fields["CapEff"] == fields["CapBnd"] == "0" * 16
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    module_daemon.done(module_daemon.delete("/v1/vms/confined?force=true"))


def test_the_serial_console_answers(module_daemon: Daemon) -> None:
    module_daemon.create_vm("talks", start=True, **TINY)
    wait_ready(module_daemon, "talks")
    uri = "ws://localhost/v1/vms/talks/console/serial"
    with unix_connect(str(module_daemon.socket), uri) as console:
        console.send(b"\necho sum-$((40 + 2))\n")
        seen = b""
        while b"sum-42" not in seen:
            frame = console.recv(timeout=20)
            seen += frame if isinstance(frame, bytes) else frame.encode()
    module_daemon.done(module_daemon.delete("/v1/vms/talks?force=true"))


def test_the_screen_is_seen_as_picture_and_over_vnc(module_daemon: Daemon) -> None:
    module_daemon.create_vm("shows", start=True, **TINY)
    assert module_daemon.get("/v1/vms/shows/screenshot").startswith(b"\x89PNG\r\n")
    with unix_connect(str(module_daemon.socket), "ws://localhost/v1/vms/shows/console/vnc") as console:
        greeting = console.recv(timeout=10)
        assert bytes(greeting, "ascii") if isinstance(greeting, str) else greeting.startswith(b"RFB 003.")
    module_daemon.done(module_daemon.delete("/v1/vms/shows?force=true"))


def test_a_killed_qemu_is_restarted_or_stays_down_as_its_policy_says(module_daemon: Daemon) -> None:
    daemon = module_daemon
    stays = daemon.create_vm("stays", start=True, on_crash="stop", **TINY)
    returns = daemon.create_vm("returns", start=True, on_crash="restart", **TINY)
    for vm in (stays, returns):
        os.kill(vm["runtime"]["pid"], signal.SIGKILL)
    vm = wait_until("the crash is seen", lambda: (v := daemon.vm("stays"))["state"] == "crashed" and v)
    assert "9" in vm["died"]["reason"]
    wait_until(
        "it is started again",
        lambda: (v := daemon.vm("returns"))["state"] == "running" and v["runtime"]["pid"] != returns["runtime"]["pid"],
    )
    for name in ("stays", "returns"):
        daemon.done(daemon.delete(f"/v1/vms/{name}?force=true"))


def test_a_vm_that_always_crashes_is_given_up(module_daemon: Daemon) -> None:
    daemon = module_daemon
    daemon.create_vm("hopeless", start=True, **TINY)
    for _ in range(6):
        vm = wait_until("it runs", lambda: (v := daemon.vm("hopeless"))["state"] == "running" and v)
        os.kill(vm["runtime"]["pid"], signal.SIGKILL)
        wait_until("the crash is seen", lambda pid=vm["runtime"]["pid"]: daemon.vm("hopeless")["runtime"]["pid"] != pid)
    events = daemon.get("/v1/events/history?limit=200")["items"]
    assert any(e["kind"] == "vm.crash_loop" and e["object_name"] == "hopeless" for e in events)
    assert daemon.vm("hopeless")["state"] == "crashed"
    daemon.done(daemon.delete("/v1/vms/hopeless"))


def test_two_starts_at_once_make_one_qemu(module_daemon: Daemon) -> None:
    daemon = module_daemon
    daemon.create_vm("twice", **TINY)

    def start(_number: int) -> Any:
        try:
            return daemon.ended(daemon.post("/v1/vms/twice/start"))["state"]
        except ApiAnswer as answer:
            return answer.body["code"]

    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(start, range(6)))
    assert answers.count("done") == 1
    assert set(answers) <= {"done", "operation_in_progress", "vm_state"}
    daemon.done(daemon.delete("/v1/vms/twice?force=true"))


def test_a_forward_leads_to_a_clear_error_when_its_port_is_taken(module_daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        module_daemon.create_vm("blocked", nics=[{"forwards": [{"host_port": port, "guest_port": 22}]}], **TINY)
        ended = module_daemon.ended(module_daemon.post("/v1/vms/blocked/start"))
    assert (ended["state"], ended["error"]["code"]) == ("failed", "port_in_use")
    assert str(port) in ended["error"]["detail"]
    assert module_daemon.vm("blocked")["state"] == "stopped"
    module_daemon.done(module_daemon.post("/v1/vms/blocked/start"))
    module_daemon.done(module_daemon.delete("/v1/vms/blocked?force=true"))


def test_a_cancelled_stop_leaves_the_vm_running(module_daemon: Daemon) -> None:
    daemon = module_daemon
    daemon.create_vm("stubborn", start=True, memory="160MiB")  # no guest: nobody hears the power button
    operation = daemon.post("/v1/vms/stubborn/stop", {"timeout_s": 600})
    daemon.post(f"/v1/operations/{operation['id']}/cancel")
    assert daemon.ended(operation)["state"] == "cancelled"
    assert daemon.vm("stubborn")["state"] == "running"
    daemon.done(daemon.post("/v1/vms/stubborn/stop", {"timeout_s": 0.1}))
    assert daemon.vm("stubborn")["state"] == "stopped"
    daemon.done(daemon.delete("/v1/vms/stubborn"))


@pytest.mark.parametrize(
    ("wish", "answer"),
    [
        ({"name": "a", "spec": {"disks": [{"image": "nowhere"}]}}, (404, "image_not_found")),
        ({"name": "a", "spec": {"disks": [{"image": "tiny", "size": "1MiB"}]}}, (422, "disk_smaller_than_image")),
        ({"name": "a", "spec": {"disks": [{"size": "-1GiB"}]}}, (422, "invalid_request")),
        ({"name": "a", "spec": {"disks": [{"size": "4000TiB"}]}}, (422, "invalid_request")),
        ({"name": "a", "spec": {"disks": [{"size": 12345678901234567890}]}}, (422, "invalid_request")),
        ({"name": "a", "spec": {"memory": "-5"}}, (422, "invalid_request")),
        ({"name": "a", "spec": {"memory": "8TiB"}}, (409, "memory_exceeds_host")),
        ({"name": "a", "spec": {"cpus": 0}}, (422, "invalid_request")),
        ({"name": "a", "spec": {"cpus": 500}}, (409, "cpus_exceed_host")),
        ({"name": "../../etc", "spec": {}}, (422, "invalid_request")),
        ({"name": "a", "spec": {"colour": "red"}}, (422, "invalid_request")),
        (
            {
                "name": "a",
                "spec": {"nics": [{"forwards": [{"host_address": "999.1.1.1", "host_port": 1, "guest_port": 1}]}]},
            },
            (422, "invalid_request"),
        ),
        ({"name": "a", "spec": {"machine": "microvm", "firmware": "uefi"}}, (422, "invalid_request")),
    ],
)
def test_what_cannot_be_is_refused_with_a_word_of_help(
    module_daemon: Daemon, wish: Any, answer: tuple[int, str]
) -> None:
    assert refused(module_daemon, "POST", "/v1/vms", wish) == answer
    assert module_daemon.get("/v1/vms?state=creating")["items"] == []


def test_a_name_is_taken_once(module_daemon: Daemon) -> None:
    module_daemon.create_vm("one")
    assert refused(module_daemon, "POST", "/v1/vms", {"name": "one"}) == (409, "name_taken")
    module_daemon.done(module_daemon.delete("/v1/vms/one"))


def test_an_idempotency_key_does_the_work_once(module_daemon: Daemon) -> None:
    body = {"name": "once"}
    first, again = (module_daemon.post("/v1/vms", body, idempotency_key="k1") for _ in range(2))
    assert first["id"] == again["id"]
    with pytest.raises(ApiAnswer) as caught:
        module_daemon.post("/v1/vms", {"name": "other"}, idempotency_key="k1")
    assert caught.value.body["code"] == "idempotency_key_reused"
    module_daemon.done(first)
    module_daemon.done(module_daemon.delete("/v1/vms/once"))


def test_a_change_on_an_old_revision_is_refused(module_daemon: Daemon) -> None:
    module_daemon.create_vm("edited")
    changed = module_daemon.call("PATCH", "/v1/vms/edited", {"cpus": 2}, timeout_s=10, If_Match='"1"')
    assert (changed["spec"]["cpus"], changed["revision"]) == (2, 2)
    with pytest.raises(ApiAnswer) as caught:
        module_daemon.call("PATCH", "/v1/vms/edited", {"cpus": 3}, timeout_s=10, If_Match='"1"')
    assert (caught.value.status, caught.value.body["code"]) == (412, "revision_changed")
    module_daemon.done(module_daemon.delete("/v1/vms/edited"))


def test_an_image_with_children_is_not_deleted(module_daemon: Daemon) -> None:
    module_daemon.create_vm("child", **TINY)
    assert refused(module_daemon, "DELETE", "/v1/images/tiny") == (409, "image_in_use")
    module_daemon.done(module_daemon.delete("/v1/vms/child"))


def test_a_machine_of_kind_microvm_runs(module_daemon: Daemon) -> None:
    module_daemon.create_vm("micro", start=True, machine="microvm", **TINY)
    wait_ready(module_daemon, "micro")
    assert refused(module_daemon, "GET", "/v1/vms/micro/screenshot")[0] == 422
    module_daemon.done(module_daemon.delete("/v1/vms/micro?force=true"))
