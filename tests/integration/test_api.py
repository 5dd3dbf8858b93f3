"""The HTTP edge: who may call, what an error looks like, the event stream, the console's refusal."""

import json
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from colmeia.testing.daemon import ApiAnswer, Daemon, LocalConnection


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def ask(url: str, context: ssl.SSLContext, token: str = "", method: str = "GET") -> tuple[int, Any]:
    request = urllib.request.Request(url, method=method, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_tcp_needs_tls_and_a_token_and_a_role_reaches_no_further(tmp_path: Path) -> None:
    port = free_port()
    daemon = Daemon(tmp_path, listen=f"127.0.0.1:{port}").start()
    try:
        context = ssl.create_default_context(cafile=daemon.state / "tls" / "server.pem")
        url = f"https://127.0.0.1:{port}"
        assert ask(f"{url}/healthz", context)[0] == 200
        assert ask(f"{url}/v1/vms", context)[1]["code"] == "token_missing"
        assert ask(f"{url}/v1/vms", context, "colmeia_wrong")[1]["code"] == "token_unknown"
        daemon.post("/v1/projects", {"name": "tenant"})
        made = {
            role: daemon.post("/v1/tokens", {"name": f"t-{role}", "role": role, "project": "tenant"})
            for role in ("admin", "member", "viewer")
        }
        assert "secret" not in daemon.get("/v1/tokens")["items"][0]
        member = made["member"]["secret"]
        assert ask(f"{url}/v1/whoami", context, member)[1]["project"] == "tenant"
        assert ask(f"{url}/v1/vms", context, member) == (200, {"items": [], "next": None})
        assert ask(f"{url}/v1/vms?project=default", context, member)[1]["code"] == "other_project"
        assert ask(f"{url}/v1/tokens", context, member)[1]["code"] == "admin_only"
        assert ask(f"{url}/v1/vms/x", context, made["viewer"]["secret"], "DELETE")[1]["code"] == "read_only"
        assert ask(f"{url}/v1/tokens", context, made["admin"]["secret"])[0] == 200
        daemon.delete("/v1/tokens/t-member")
        assert ask(f"{url}/v1/vms", context, member)[0] == 401
    finally:
        daemon.close()


def test_a_header_cannot_pose_as_the_local_socket(tmp_path: Path) -> None:
    port = free_port()
    daemon = Daemon(tmp_path, listen=f"127.0.0.1:{port}").start()
    try:
        context = ssl.create_default_context(cafile=daemon.state / "tls" / "server.pem")
        request = urllib.request.Request(f"https://127.0.0.1:{port}/v1/vms", headers={"X-Forwarded-For": "unix:0"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, context=context, timeout=10)
        caught.value.close()
        assert caught.value.code == 401
    finally:
        daemon.close()


def test_errors_are_problem_documents(module_daemon: Daemon) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/v1/vms", 405), ("POST", "/v1/vms", 422)):
        with pytest.raises(ApiAnswer) as caught:
            module_daemon.call(method, path)
        assert caught.value.status == status
        assert {"type", "title", "status", "kind", "code", "detail", "hint"} <= set(caught.value.body)


def read_events(daemon: Daemon, count: int, **headers: str) -> list[dict[str, Any]]:
    connection = LocalConnection(daemon.socket, 10)
    try:
        connection.request("GET", "/v1/events?after=0", headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        events: list[dict[str, Any]] = []
        while len(events) < count:
            line = response.readline().decode()
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
        return events
    finally:
        connection.close()


def test_the_event_stream_resumes_without_a_gap(module_daemon: Daemon) -> None:
    module_daemon.create_vm("noisy")
    module_daemon.done(module_daemon.delete("/v1/vms/noisy"))
    first = read_events(module_daemon, 5)
    rest = read_events(module_daemon, 2, Last_Event_ID=str(first[2]["seq"]))
    assert rest == first[3:5]


def test_a_second_daemon_on_the_same_state_is_refused(module_daemon: Daemon) -> None:
    second = subprocess.run(
        [sys.executable, "-c", "from colmeia.cli.main import main; main()", "serve"],
        env=module_daemon.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 4
    assert "Another daemon uses" in second.stderr
    assert module_daemon.get("/healthz")["status"] == "ok"


def test_the_documentation_needs_no_internet(module_daemon: Daemon) -> None:
    page = module_daemon.get("/docs").decode()
    assert "://" not in page.replace("http://www.w3.org", "")
    assert len(module_daemon.get("/docs/assets/swagger-ui-bundle.js")) > 100_000


def test_metrics_count_by_state(module_daemon: Daemon) -> None:
    module_daemon.create_vm("counted")
    assert b'colmeia_vms{state="stopped"} 1.0' in module_daemon.get("/metrics")
    module_daemon.done(module_daemon.delete("/v1/vms/counted"))
