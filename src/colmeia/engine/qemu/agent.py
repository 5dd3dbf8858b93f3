"""Talking to the guest agent (qemu-ga) through its channel, from the host's side of a hostile guest.

JSON lines, one command at a time, each on its own connection that starts with `guest-sync-delimited` (QEMU's
qga/qapi-schema.json), so that a late answer to an earlier question is never taken for this one. It believes nothing the
guest sends: what is too long, or no JSON, is an error, never a hang.
"""

import json
import secrets
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import SocketStream

from colmeia.model.errors import ColmeiaError, Conflict, Unsupported

_MAX_REPLY = 24 * 1024 * 1024  # guest-exec-status carries at most 16 MiB of output, as base64
_CHUNK = 256 * 1024
_DELIMITER = b"\xff"
_HINT = "Is qemu-guest-agent installed in the guest and has it booted?"


async def run_command(path: Path, command: str, arguments: dict[str, Any] | None, *, timeout_s: float) -> Any:
    """Run one agent command and return what it answers. Cancel-safe; one at a time per VM (the caller's lock).

    Raises Conflict (`agent_silent`, `agent_garbage`, `agent_refused`: what the guest does is not our failure),
    Unsupported (`agent_command`).
    """
    try:
        with anyio.fail_after(timeout_s):
            async with await anyio.connect_unix(path) as stream:
                return await _converse(_Lines(stream), command, arguments)
    except TimeoutError:
        message = f"The guest agent did not answer {command} in {timeout_s:.0f} s."
        raise Conflict("agent_silent", message, _HINT) from None
    except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
        raise Conflict("agent_silent", f"The guest agent's channel closed during {command}.", _HINT) from error


class _Lines:
    """Lines of bounded length from a stream."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def read(self) -> bytes:
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            if scanned > _MAX_REPLY:
                raise _garbage(f"sent more than {_MAX_REPLY >> 20} MiB in one answer")
            self._buffer += await self.stream.receive(_CHUNK)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


async def _converse(lines: _Lines, command: str, arguments: dict[str, Any] | None) -> Any:
    mark = secrets.randbits(31)
    sync = {"execute": "guest-sync-delimited", "arguments": {"id": mark}}
    await lines.stream.send(_DELIMITER + json.dumps(sync).encode() + b"\n")
    await _wait_synced(lines, mark)
    request: dict[str, Any] = {"execute": command}
    if arguments is not None:
        request["arguments"] = arguments
    await lines.stream.send(json.dumps(request).encode() + b"\n")
    return _result(await lines.read(), command)


async def _wait_synced(lines: _Lines, mark: int) -> None:
    """Skip everything up to the answer with our own mark; the deadline is the caller's."""
    while True:
        line = (await lines.read()).rpartition(_DELIMITER)[2]
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict) and answer.get("return") == mark:
            return


def _result(line: bytes, command: str) -> Any:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise _garbage(f"answered {command} with something that is no JSON") from None
    if isinstance(answer, dict) and "return" in answer:
        return answer["return"]
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        raise _refusal(answer["error"], command)
    raise _garbage(f"answered {command} with neither a result nor an error")


def _refusal(error: dict[str, Any], command: str) -> ColmeiaError:
    text = str(error.get("desc", ""))[:500]
    if error.get("class") == "CommandNotFound":
        return Unsupported("agent_command", f"The guest's agent does not know {command}: {text}")
    return Conflict("agent_refused", f"The guest's agent refused {command}: {text}")


def _garbage(what: str) -> ColmeiaError:
    return Conflict("agent_garbage", f"The guest's agent {what}.", "Whatever runs there is not qemu-guest-agent.")
