"""Whatever is sent to the API, it answers as its own document says, and never with a defect.

Schemathesis draws requests from `/openapi.json`, good ones and bad ones, for a real daemon. Left out: the streams that
never end, and importing or building images, which would fetch from wherever the request says.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

from colmeia.testing.daemon import ApiAnswer, Daemon

LEFT_OUT = {"GET /v1/events", "POST /v1/images", "POST /v1/images/build"}
CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
FUZZED = settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
ODD = [b"\0", b"a\0b", b"\xff\xfe", "ü".encode(), "\u202e\U0001f41d".encode(), b"\x7f", b"'\"<>;", b"9" * 300]


@pytest.fixture
def fuzzed(tmp_path: Path) -> Iterator[tuple[Daemon, str]]:
    """A daemon that also listens on TCP, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    daemon = Daemon(tmp_path, listen=address).start()
    yield daemon, f"https://{address}"
    for project in daemon.get("/v1/projects")["items"]:
        for vm in daemon.get(f"/v1/vms?project={project['name']}")["items"]:
            delete_whatever_it_does(daemon, f"/v1/vms/{vm['id']}?force=true&project={project['name']}")
    daemon.close()


def delete_whatever_it_does(daemon: Daemon, path: str) -> None:
    """Delete a VM that may still be worked on: its operation is waited for first."""
    try:
        daemon.done(daemon.delete(path))
    except ApiAnswer as answer:
        assert answer.body["code"] == "operation_in_progress", answer
        for operation in daemon.get("/v1/operations?limit=1000")["items"]:
            daemon.ended(operation)
        daemon.done(daemon.delete(path))


def reach(case: Case, known: dict[str, str]) -> None:
    """Point a request at things that exist, and let it neither wait long nor follow a log for ever."""
    for name, value in known.items():
        if name in case.path_parameters:
            case.path_parameters[name] = value
    if isinstance(case.query, dict) or case.query:
        case.query.pop("follow", None)
    if isinstance(case.body, dict) and "timeout_s" in case.body:
        case.body["timeout_s"] = 0.1


def objections(
    operation: APIOperation[Any, Any, Any, Any],
    session: requests.Session,
    url: str,
    known: dict[str, str],
    certificate: str,
) -> str:
    """Fuzz one operation; return what is wrong with its answers, or nothing."""
    modes = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]

    @FUZZED
    @given(case=st.one_of(*modes), is_known=st.booleans())
    def fuzz(case: Case, is_known: bool) -> None:
        if is_known:
            reach(case, known)
        answer = case.call(base_url=url, session=session, timeout=30, verify=certificate)
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text}"
        case.validate_response(answer, checks=CHECKS)

    try:
        fuzz()
    except (AssertionError, FailureGroup, requests.RequestException) as error:
        return f"{operation.label}: {error!r} {getattr(error, 'exceptions', '')}"
    return ""


def test_every_operation_answers_as_documented(fuzzed: tuple[Daemon, str]) -> None:
    daemon, url = fuzzed
    token = daemon.post("/v1/tokens", {"name": "fuzz", "role": "admin"})["secret"]
    made = daemon.done(daemon.post("/v1/vms", {"name": "web1", "spec": {"memory": "64MiB"}, "start": True}))
    daemon.post("/v1/tokens", {"name": "spare", "role": "viewer"})
    known = {"vm": "web1", "operation": made["id"], "operation_id": made["id"], "token": "spare", "project": "default"}
    schema = schemathesis.openapi.from_dict(daemon.get("/openapi.json"))
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.label not in LEFT_OUT]
    assert len(operations) > 20
    operations.sort(key=lambda operation: operation.method == "delete")  # what is fuzzed should exist meanwhile
    certificate = str(daemon.state / "tls" / "server.pem")
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {token}"
        found = [text for operation in operations if (text := objections(operation, session, url, known, certificate))]
    assert not found, "\n".join(found)
    assert "defect" not in daemon.log.read_text()


@pytest.mark.parametrize(
    "header", ["If-Match", "Idempotency-Key", "Authorization", "Last-Event-ID", "Host", "Content-Type", "X-Any"]
)
def test_odd_bytes_in_a_header_are_never_a_defect(module_daemon: Daemon, header: str) -> None:
    for value in ODD:
        for request in (b"PATCH /v1/vms/nobody", b"POST /v1/vms/nobody/start", b"GET /v1/events/history"):
            head = request + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(10)
                connection.connect(str(module_daemon.socket))
                connection.sendall(head + header.encode() + b": " + value + b"\r\n\r\n{}")
                status = connection.makefile("rb").readline().split()[1]
            assert 200 <= int(status) < 500, (request, header, value)
