"""The SDK against a real HTTP server that speaks the contract: errors, retries, waiting, pages, streams, consoles."""

import json
import os
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from colmeia.cli.main import run
from colmeia.client import ApiError, AsyncClient, Client, ClientError, OperationFailed, ServerUnreachable, find_address
from colmeia.client.errors import problem_error
from colmeia.client.sse import EventDecoder

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def operation(**fields: Any) -> dict[str, Any]:
    return {
        "id": "0" * 16,
        "kind": "vm.start",
        "target_kind": "vm",
        "target_id": "1" * 16,
        "target_name": "web1",
        "state": "running",
        "progress": 0.5,
        "message": "",
        "error": None,
        **fields,
    }


VM = {
    "id": "1" * 16,
    "name": "web1",
    "state": "running",
    "spec": {"cpus": 1, "memory": "512MiB", "disks": [], "nics": []},
    "runtime": {"accelerator": "tcg", "warnings": ["KVM is unusable: TCG is used."]},
    "created_at": "2026-01-01T00:00:00Z",
}
PROBLEM = {
    "type": "urn:colmeia:vm_state",
    "title": "conflict",
    "status": 409,
    "kind": "conflict",
    "code": "vm_state",
    "detail": "Cannot start VM web1: it is running.",
    "hint": "Possible now: stop.",
}


class FakeServer:
    """A server that plays the contract and notes what it was asked."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.cuts = 0
        self.looks = 0
        self.ending: dict[str, Any] = {"state": "done", "progress": 1.0}
        routes = [
            Route("/v1/vms", self.list_vms),
            Route("/v1/vms/web1/start", self.refuse, methods=["POST"]),
            Route("/v1/vms/web1/stop", self.accept, methods=["POST"]),
            Route("/v1/vms/web1/exec", self.execute, methods=["POST"]),
            Route("/v1/vms/{vm}", self.show_vm, methods=["GET", "PATCH"]),
            Route("/v1/operations/{id}", self.show_operation),
            Route("/v1/events", self.stream),
            Route("/v1/images/tiny/export", self.export),
            Route("/v1/tokens/{id}", lambda _request: Response(status_code=204), methods=["DELETE"]),
            WebSocketRoute("/v1/vms/{vm}/console/serial", self.serial),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off", ws="websockets-sansio")
        self._server = uvicorn.Server(config)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(20)
        self._socket.close()

    async def _note(self, request: Request) -> None:
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        self.requests.append((request.method, target, dict(request.headers), await request.body()))

    async def list_vms(self, request: Request) -> Response:
        await self._note(request)
        if request.query_params.get("cursor"):
            return JSONResponse({"items": [{**VM, "name": "web2"}], "next": None})
        return JSONResponse({"items": [VM], "next": "web1.0000000000000001"})

    async def show_vm(self, request: Request) -> Response:
        await self._note(request)
        if request.path_params["vm"] == "absent":
            return JSONResponse({**PROBLEM, "status": 404, "kind": "not_found", "code": "vm_unknown"}, 404)
        return JSONResponse(VM)

    async def refuse(self, request: Request) -> Response:
        await self._note(request)
        return JSONResponse(PROBLEM, 409, media_type="application/problem+json")

    async def accept(self, request: Request) -> Response:
        """Take the request and, as often as told, cut the connection instead of answering."""
        await self._note(request)
        if self.cuts:
            self.cuts -= 1
            return StreamingResponse(_cut(), headers={"Content-Length": "100"})
        return JSONResponse(operation(kind="vm.stop"), 202)

    async def execute(self, request: Request) -> Response:
        await self._note(request)
        if self.cuts:
            self.cuts -= 1
            return StreamingResponse(_cut(), headers={"Content-Length": "100"})
        command = json.loads(await request.body())["command"]
        return JSONResponse({"exit_code": 3, "stdout": " ".join(command) + "\n", "stderr": "no\n"})

    async def show_operation(self, request: Request) -> Response:
        await self._note(request)
        self.looks += 1
        return JSONResponse(operation(**(self.ending if self.looks > 2 else {})))

    async def stream(self, request: Request) -> Response:
        """Send two events behind the position, the second cut in its middle, then break off."""
        await self._note(request)
        after = request.query_params["after"]
        return StreamingResponse(_events(0 if after == "now" else int(after)), media_type="text/event-stream")

    async def export(self, request: Request) -> Response:
        await self._note(request)
        return Response(b"QFI\xfb" * 100_000)

    async def serial(self, websocket: WebSocket) -> None:
        await websocket.accept()
        if websocket.path_params["vm"] == "absent":
            await websocket.close(1008, "VM absent is stopped.")
            return
        await websocket.send_bytes(b"login: ")
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await websocket.send_bytes(b"<" + message["bytes"] + b">")


async def _cut() -> AsyncIterator[bytes]:
    yield b"{"


async def _events(after: int) -> AsyncIterator[bytes]:
    yield b": hello\n\n"
    yield f'id: {after + 1}\nevent: vm.state\ndata: {{"seq": {after + 1}, '.encode()
    yield b'"kind": "vm.state"}\n\n'
    yield f'id: {after + 2}\nevent: vm.state\ndata: {{"seq": '.encode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer(tmp_path / "api.sock")
    yield fake
    fake.stop()


def test_a_refusal_keeps_every_word_of_the_problem(server: FakeServer) -> None:
    with Client(server.url) as client, pytest.raises(ApiError) as caught:
        client.vms.start("web1")
    error = caught.value
    assert (error.status, error.kind, error.code) == (409, "conflict", "vm_state")
    assert (error.detail, error.hint) == (PROBLEM["detail"], PROBLEM["hint"])


def test_an_answer_that_is_no_problem_document_is_still_an_error() -> None:
    error = problem_error(502, b"<h1>Bad gateway</h1>\n")
    assert (error.status, error.kind, error.code) == (502, "internal", "http_502")
    assert "Bad gateway" in error.detail


def test_lists_follow_the_pages_and_the_project_goes_along(server: FakeServer) -> None:
    with Client(server.url, project="shop") as client:
        assert [vm["name"] for vm in client.vms.list(state="running")] == ["web1", "web2"]
        assert [vm["name"] for vm in client.vms.list(limit=1)] == ["web1"]
    assert [target for _, target, _, _ in server.requests] == [
        "/v1/vms?project=shop&state=running",
        "/v1/vms?project=shop&state=running&cursor=web1.0000000000000001",
        "/v1/vms?project=shop&limit=1",
    ]


def test_a_lost_answer_is_asked_for_again_under_the_same_key(server: FakeServer) -> None:
    server.cuts = 2
    with Client(server.url) as client:
        assert client.vms.stop("web1", force=True)["kind"] == "vm.stop"
    keys = {headers["idempotency-key"] for _, _, headers, _ in server.requests}
    assert (len(server.requests), len(keys)) == (3, 1)


def test_a_guest_command_is_never_run_twice(server: FakeServer) -> None:
    server.cuts = 1
    with Client(server.url) as client, pytest.raises(ServerUnreachable) as caught:
        client.vms.exec("web1", ["reboot"])
    assert caught.value.is_sent
    assert len(server.requests) == 1


def test_nobody_at_the_socket_is_said_at_once(tmp_path: Path) -> None:
    with Client(str(tmp_path / "none.sock")) as client, pytest.raises(ServerUnreachable) as caught:
        client.vms.list()
    assert not caught.value.is_sent
    assert "no such socket" in caught.value.detail


def test_nobody_at_the_port_is_said_in_the_same_words() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with (
            Client(f"http://127.0.0.1:{unused.getsockname()[1]}") as client,
            pytest.raises(ServerUnreachable) as caught,
        ):
            client.vms.list()
    assert not caught.value.is_sent


def test_waiting_ends_with_the_operation(server: FakeServer) -> None:
    seen: list[float] = []
    with Client(server.url) as client:
        ended = client.operations.wait("0" * 16, on_progress=lambda latest: seen.append(latest["progress"]))
    assert ended["state"] == "done"
    assert seen == [0.5, 0.5, 1.0]


def test_waiting_for_one_that_fails_raises_its_reason(server: FakeServer) -> None:
    server.ending = {
        "state": "failed",
        "error": {"kind": "busy", "code": "port", "detail": "Port taken.", "hint": "Other."},
    }
    with Client(server.url) as client, pytest.raises(OperationFailed) as caught:
        client.operations.wait("0" * 16)
    assert (caught.value.kind, caught.value.code, caught.value.detail) == ("busy", "port", "Port taken.")


def test_events_resume_behind_the_last_one_seen(server: FakeServer) -> None:
    with Client(server.url) as client:
        stream = client.events.follow()
        assert [next(stream)["seq"] for _ in range(3)] == [1, 2, 3]
        stream.close()  # type: ignore[attr-defined]
    positions = [target for _, target, _, _ in server.requests]
    assert positions == ["/v1/events?after=now", "/v1/events?after=1", "/v1/events?after=2"]


def test_an_event_is_read_wherever_the_stream_is_cut() -> None:
    text = 'id: 7\nevent: x\ndata: {"seq": 7, "kind": "é"}\n\n: alive\n\n'.encode()
    for at in range(len(text)):
        decoder = EventDecoder()
        assert [event["seq"] for part in (text[:at], text[at:]) for event in decoder.feed(part)] == [7]


def test_an_export_is_written_whole(server: FakeServer, tmp_path: Path) -> None:
    with Client(server.url) as client, (tmp_path / "x").open("wb") as file:
        assert client.images.export("tiny", file) == 400_000
    assert (tmp_path / "x").stat().st_size == 400_000


def test_a_deletion_without_content_is_fine(server: FakeServer) -> None:
    with Client(server.url) as client:
        client.tokens.delete("laptop")


def test_a_change_can_insist_on_the_revision(server: FakeServer) -> None:
    with Client(server.url) as client:
        client.vms.update("web1", {"cpus": 2}, if_match=4)
    assert server.requests[0][2]["if-match"] == '"4"'


async def test_the_async_client_does_the_same(server: FakeServer) -> None:
    async with AsyncClient(server.url) as client:
        assert [vm["name"] for vm in await client.vms.list()] == ["web1", "web2"]
        with pytest.raises(ApiError, match="Cannot start"):
            await client.vms.start("web1")
        server.cuts = 1
        assert (await client.vms.stop("web1"))["kind"] == "vm.stop"
        assert (await client.operations.wait("0" * 16))["state"] == "done"
        stream = client.events.follow()
        assert [(await anext(stream))["seq"] for _ in range(3)] == [1, 2, 3]
        await stream.aclose()  # type: ignore[attr-defined]


async def test_a_console_carries_bytes_both_ways(server: FakeServer) -> None:
    with anyio.fail_after(20):
        async with AsyncClient(server.url) as client, client.vms.console("web1") as console:
            chunks = aiter(console)
            assert await anext(chunks) == b"login: "
            await console.send(b"root\r")
            assert await anext(chunks) == b"<root\r>"


async def test_a_refused_console_says_why(server: FakeServer) -> None:
    with anyio.fail_after(20):
        async with AsyncClient(server.url) as client, client.vms.console("absent") as console:
            with pytest.raises(ApiError, match="VM absent is stopped"):
                await anext(aiter(console))


def test_addresses_are_read_from_text_and_environment() -> None:
    assert find_address("unix:///x/y.sock", environ={}).socket == "/x/y.sock"
    https = find_address(environ={"COLMEIA_SERVER": "https://h:8440/", "COLMEIA_TOKEN": "t", "COLMEIA_CA": "/ca"})
    assert (https.url, https.socket, https.token, https.ca_file) == ("https://h:8440", None, "t", "/ca")
    assert "t" not in repr(https).replace("https", "").replace("token", "").split("url")[0]
    assert find_address("/s", environ={"COLMEIA_TOKEN": "t"}).token is None
    for wrong in ("ftp://x", "host:80", "unix://relative"):
        with pytest.raises(ClientError):
            find_address(wrong, environ={})


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["vm", "list"], 0, "web2", ""),
        (["vm", "show", "absent"], 3, "", "Error: "),
        (["vm", "start", "web1"], 4, "", "Hint: Possible now: stop."),
        (["vm", "stop", "web1"], 0, "VM web1 is running\n", "Warning: KVM is unusable: TCG is used."),
        (["vm", "stop", "web1", "--no-wait"], 0, "Operation 0000000000000000 (vm.stop web1) is running", ""),
        (["vm", "exec", "web1", "--", "ls", "-o", "x"], 3, "ls -o x\n", "no\n"),
        (["operation", "wait", "0" * 16, "-o", "json"], 0, '"state": "done"', ""),
    ],
)
def test_commands_answer_and_end_as_promised(
    server: FakeServer, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, out: str, err: str
) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    assert run([*arguments[:at], "--server", server.url, *arguments[at:]]) == code
    printed = capsys.readouterr()
    assert out in printed.out
    assert err in printed.err


@pytest.mark.parametrize("typed", [b"uptime\n", b"uptime\n~.never sent"])
def test_the_console_works_in_a_pipe(server: FakeServer, typed: bytes) -> None:
    command = [
        sys.executable,
        "-m",
        "colmeia.cli.main",
        "vm",
        "console",
        "web1",
        "--idle",
        "0.5",
        "--server",
        server.url,
    ]
    done = subprocess.run(command, input=typed, capture_output=True, timeout=60, check=True)
    assert done.stdout.startswith(b"login: ")
    assert b"never" not in done.stdout
    if b"~." not in typed:
        assert done.stdout == b"login: <uptime\n>"


def test_the_console_on_a_terminal_is_raw_and_left_by_its_escape(server: FakeServer) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "colmeia.cli.main", "vm", "console", "web1", "--server", server.url]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as console:
        try:
            assert console.stdout is not None
            assert console.stderr is not None
            assert b"Leave with ~." in console.stderr.readline()
            assert console.stdout.read(7) == b"login: "
            before = termios.tcgetattr(ours)[3]
            os.write(ours, b"\x03")
            assert console.stdout.read(3) == b"<\x03>"
            os.write(ours, b"\r~.")
            assert console.wait(20) == 0
            assert not before & termios.ICANON
            assert termios.tcgetattr(ours)[3] & termios.ICANON
        finally:
            console.kill()
            os.close(ours)
            os.close(theirs)
