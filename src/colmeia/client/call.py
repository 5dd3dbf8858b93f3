"""Every request of the API as a value: said once, carried out by the sync and the async client alike. No I/O."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from colmeia.client.address import Address
from colmeia.client.errors import ServerUnreachable
from colmeia.client.shapes import ExecResult, Json, Operation, Page, Project, Token, Vm

T = TypeVar("T")
Query = Mapping[str, str | int | bool | None]

TIMEOUT_S = 60.0
RETRY_DELAYS_S = (0.1, 0.4)
PAGE_MAX = 1000
FINAL_STATES = frozenset({"done", "failed", "cancelled"})


def _nothing(_body: bytes) -> None:
    return None


def _text(body: bytes) -> str:
    return body.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. ``key`` makes a change safe to send twice; ``answer`` turns the body of a 2xx into the result."""

    method: str
    path: str
    query: Query = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    timeout_s: float = TIMEOUT_S
    answer: Callable[[bytes], T] = json.loads

    def asking(self, **more: str | int | bool | None) -> "Call[T]":
        """Return the call with more query parameters."""
        return replace(self, query={**self.query, **more})


@dataclass(frozen=True, slots=True)
class Request:
    """A call made ready for one server: what goes over the wire."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes | None
    timeout_s: float


def prepare(call: Call[Any], address: Address, project: str | None) -> Request:
    """Write the call out for one server; a project that the call does not name itself goes into the query."""
    query = {"project": project, **call.query}
    pairs = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in query.items() if v is not None}
    headers = {"Accept": "application/json", **call.headers}
    if address.token:
        headers["Authorization"] = f"Bearer {address.token}"
    if call.key:
        headers["Idempotency-Key"] = call.key
    body = None
    if call.body is not None:
        body = json.dumps(call.body).encode()
        headers["Content-Type"] = "application/json"
    target = f"{call.path}?{urlencode(pairs)}" if pairs else call.path
    return Request(call.method, target, headers, body, call.timeout_s)


def may_retry(call: Call[Any], error: ServerUnreachable) -> bool:
    """Tell whether sending again cannot do harm: it never arrived, it only reads, or its key makes it one request."""
    if error.is_timeout:
        return False
    return not error.is_sent or call.method == "GET" or call.key is not None


def _ref(noun: str, ref: str, action: str = "") -> str:
    return f"/v1/{noun}/{quote(ref, safe='')}{'/' + action if action else ''}"


def _work(method: str, path: str, body: Mapping[str, Any] | None = None, query: Query | None = None) -> Call[Operation]:
    """Ask for long work. The key makes one operation of it, however often the request arrives."""
    return Call(method, path, query or {}, body=body, key=os.urandom(16).hex())


def _post(path: str, body: Mapping[str, Any] | None = None) -> Call[Any]:
    return Call("POST", path, body=body)


def list_page(noun: str, **query: str | int | None) -> Call[Page]:
    return Call("GET", f"/v1/{noun}", query)


def show(noun: str, ref: str) -> Call[Any]:
    return Call("GET", _ref(noun, ref))


def create_vm(body: Mapping[str, Any]) -> Call[Operation]:
    return _work("POST", "/v1/vms", body)


def update_vm(ref: str, changes: Mapping[str, Any], if_match: int | None) -> Call[Vm]:
    headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
    return Call("PATCH", _ref("vms", ref), body=changes, headers=headers)


def delete_vm(ref: str, *, force: bool) -> Call[Operation]:
    return _work("DELETE", _ref("vms", ref), query={"force": force or None})


def act_on_vm(ref: str, action: str, body: Mapping[str, Any] | None = None) -> Call[Operation]:
    return _work("POST", _ref("vms", ref, action), body)


def stop_body(*, force: bool, timeout_s: float) -> Json:
    return {"force": force, "timeout_s": timeout_s}


def run_in_vm(ref: str, command: Sequence[str], stdin: str | None, timeout_s: float) -> Call[ExecResult]:
    """Carries no key: an answer that got lost does not prove that the command may run again."""
    body = {"command": list(command), "input": stdin, "timeout_s": timeout_s}
    return Call("POST", _ref("vms", ref, "exec"), body=body, timeout_s=timeout_s + 30)


def read_logs(ref: str, lines: int | None, *, follow: bool = False) -> Call[str]:
    query = {"lines": lines, "follow": follow or None}
    return Call("GET", _ref("vms", ref, "logs"), query, headers={"Accept": "text/plain"}, answer=_text)


def take_screenshot(ref: str) -> Call[bytes]:
    return Call("GET", _ref("vms", ref, "screenshot"), headers={"Accept": "image/png"}, answer=bytes)


def open_console(ref: str, kind: str) -> Call[None]:
    return Call("GET", _ref("vms", ref, f"console/{kind}"), answer=_nothing)


def import_image(body: Mapping[str, Any]) -> Call[Operation]:
    return _work("POST", "/v1/images", body)


def build_image(body: Mapping[str, Any]) -> Call[Operation]:
    return _work("POST", "/v1/images/build", body)


def delete_image(ref: str) -> Call[Operation]:
    return _work("DELETE", _ref("images", ref))


def export_image(ref: str, image_format: str) -> Call[bytes]:
    headers = {"Accept": "application/octet-stream"}
    return Call("GET", _ref("images", ref, "export"), {"format": image_format}, headers=headers, answer=bytes)


def wait_operation(ref: str, seconds: float) -> Call[Operation]:
    return Call("GET", _ref("operations", ref), {"wait": f"{seconds:g}"}, timeout_s=seconds + 30)


def cancel_operation(ref: str) -> Call[Operation]:
    return _post(_ref("operations", ref, "cancel"))


def follow_events(after: int | str) -> Call[None]:
    return Call("GET", "/v1/events", {"after": after}, headers={"Accept": "text/event-stream"}, answer=_nothing)


def create_project(name: str) -> Call[Project]:
    return _post("/v1/projects", {"name": name})


def delete_project(ref: str) -> Call[None]:
    return Call("DELETE", _ref("projects", ref), answer=_nothing)


def create_token(name: str, role: str, project: str | None) -> Call[Token]:
    return _post("/v1/tokens", {"name": name, "role": role, "project": project})


def delete_token(ref: str) -> Call[None]:
    return Call("DELETE", _ref("tokens", ref), answer=_nothing)


def read_host() -> Call[Json]:
    return Call("GET", "/v1/host")


def examine_host() -> Call[list[Json]]:
    return Call("GET", "/v1/host/doctor")


def who_am_i() -> Call[Json]:
    return Call("GET", "/v1/whoami")
