"""What can go wrong for a caller of the SDK, ordered by what the caller can do about it."""

import json
from typing import Any


class ClientError(Exception):
    """Base of all the SDK raises. ``kind`` is the word of the server's error tree, ``hint`` what to do now."""

    def __init__(self, kind: str, code: str, detail: str, hint: str = "") -> None:
        super().__init__(f"{detail} {hint}".strip())
        self.kind = kind
        self.code = code
        self.detail = detail
        self.hint = hint


class ApiError(ClientError):
    """The server refused or failed: its problem+json (RFC 9457), with the HTTP status and, if given, field errors."""

    def __init__(
        self, status: int, kind: str, code: str, detail: str, hint: str = "", errors: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(kind, code, detail, hint)
        self.status = status
        self.errors = errors


class ServerUnreachable(ClientError):
    """No answer. ``is_sent`` tells whether the request may have arrived, and so whether its outcome is unknown."""

    def __init__(
        self, where: str, reason: str, hint: str = "", *, is_sent: bool = False, is_timeout: bool = False
    ) -> None:
        super().__init__("unreachable", "server_unreachable", f"The server at {where} does not answer: {reason}.", hint)
        self.is_sent = is_sent
        self.is_timeout = is_timeout


class OperationFailed(ClientError):
    """An operation that was waited for ended failed or cancelled. ``operation`` is its last state."""

    def __init__(self, operation: dict[str, Any], kind: str, code: str, detail: str, hint: str = "") -> None:
        super().__init__(kind, code, detail, hint)
        self.operation = operation


class WaitTimeout(ClientError):
    """The operation was not over in time. It goes on at the server; ``operation`` is its last state seen."""

    def __init__(self, operation: dict[str, Any], timeout_s: float) -> None:
        super().__init__(
            "timeout",
            "wait_timeout",
            f"Operation {operation['id']} ({operation['kind']} {operation['target_name']}) "
            f"is still {operation['state']} after {timeout_s:g} s.",
            "It goes on at the server: wait for it again or cancel it.",
        )
        self.operation = operation


_KINDS = {401: "unauthenticated", 403: "forbidden", 404: "not_found", 409: "conflict", 412: "precondition_failed"}


def problem_error(status: int, body: bytes) -> ApiError:
    """Read an error answer; one that is not problem+json (a proxy's page, say) keeps its status and first line."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    kind = _KINDS.get(status, "invalid" if status < 500 else "internal")
    if not isinstance(problem, dict):
        text = body.decode(errors="replace").strip().splitlines()
        detail = text[0][:300] if text else "no explanation was given"
        return ApiError(status, kind, f"http_{status}", f"The server answered {status}: {detail}")
    detail = problem.get("detail") or problem.get("title") or f"The server answered {status}."
    return ApiError(
        status,
        str(problem.get("kind") or kind),
        str(problem.get("code") or f"http_{status}"),
        detail if isinstance(detail, str) else json.dumps(detail),
        str(problem.get("hint") or ""),
        tuple(problem.get("errors") or ()),
    )


def check_ended_well(operation: dict[str, Any]) -> None:
    """Raise OperationFailed for an operation that ended failed or cancelled."""
    if operation["state"] not in ("failed", "cancelled"):
        return
    error = operation.get("error") or {}
    what = f"{operation['kind']} {operation['target_name']}"
    if operation["state"] == "cancelled":
        raise OperationFailed(operation, "cancelled", "operation_cancelled", f"Operation {what} was cancelled.")
    raise OperationFailed(
        operation,
        error.get("kind", "internal"),
        error.get("code", "operation_failed"),
        error.get("detail") or f"Operation {what} failed.",
        error.get("hint", ""),
    )
