"""The blocking client. One method per request of the API, grouped by noun; safe to use from several threads.

Connection failures are retried when that cannot do harm (see `call.may_retry`). Refuses to hide an error: everything
else is raised at once.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from colmeia.client import call as calls
from colmeia.client.address import Address, find_address
from colmeia.client.call import FINAL_STATES, RETRY_DELAYS_S, Call, may_retry, prepare
from colmeia.client.errors import ApiError, ServerUnreachable, WaitTimeout, check_ended_well, problem_error
from colmeia.client.shapes import Event, ExecResult, Image, Json, Operation, Project, Token, Vm
from colmeia.client.sse import EventDecoder
from colmeia.client.wire import Reply, open_wire

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long a wait or a stream outlives a daemon that is away (a restart, an upgrade)."""


class Client:
    """A Colmeia server. ``project`` goes along with every request; absent, the server takes the caller's own."""

    def __init__(
        self, server: str | Address | None = None, *, token: str | None = None, project: str | None = None
    ) -> None:
        self.address = server if isinstance(server, Address) else find_address(server, token=token)
        self.project = project
        self._wire = open_wire(self.address)
        self.vms = Vms(self)
        self.images = Images(self)
        self.operations = Operations(self)
        self.events = Events(self)
        self.projects = Projects(self)
        self.tokens = Tokens(self)
        self.host = Host(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go. Idempotent."""
        self._wire.close()

    def whoami(self) -> Json:
        """Return the identity the server sees."""
        return self.send(calls.who_am_i())

    def open(self, call: Call[Any]) -> Reply:
        """Send and return the answer with its body unread, for streams. Raises ApiError, ServerUnreachable."""
        request = prepare(call, self.address, self.project)
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                reply = self._wire.send(request)
                break
            except ServerUnreachable as error:
                if delay_s is None or not may_retry(call, error):
                    raise
                time.sleep(delay_s)
        if reply.status >= 300:
            with closing(reply):
                raise problem_error(reply.status, reply.read())
        return reply

    def send(self, call: Call[T]) -> T:
        """Send and return the result. Raises ApiError, ServerUnreachable."""
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                with closing(self.open(call)) as reply:
                    return call.answer(reply.read())
            except ServerUnreachable as error:
                if delay_s is None or not error.is_sent or not may_retry(call, error):
                    raise
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def collect(self, noun: str, limit: int | None, **query: str | int | None) -> list[Any]:
        """Return the whole list, page by page, or its first ``limit``."""
        items: list[Any] = []
        cursor: str | None = None
        while True:
            rest = None if limit is None else min(limit - len(items), calls.PAGE_MAX)
            page = self.send(calls.list_page(noun, **query, limit=rest, cursor=cursor))
            items += page["items"]
            cursor = page["next"]
            if cursor is None or (limit is not None and len(items) >= limit):
                return items[:limit]


class Noun:
    """What the groups share: the client."""

    def __init__(self, client: Client) -> None:
        self._client = client


class Vms(Noun):
    """Virtual machines. ``ref`` is a name or an id."""

    def list(self, *, state: str | None = None, limit: int | None = None) -> "list[Vm]":
        return self._client.collect("vms", limit, state=state)

    def show(self, ref: str) -> Vm:
        vm: Vm = self._client.send(calls.show("vms", ref))
        return vm

    def create(self, body: Mapping[str, Any]) -> Operation:
        """Ask for a VM: ``{"name": …, "spec": {…}, "start": bool}``. The operation's target is the VM."""
        return self._client.send(calls.create_vm(body))

    def update(self, ref: str, changes: Mapping[str, Any], *, if_match: int | None = None) -> Vm:
        """Change fields of the spec, only if its revision still is ``if_match`` when that is given."""
        return self._client.send(calls.update_vm(ref, changes, if_match))

    def delete(self, ref: str, *, force: bool = False) -> Operation:
        return self._client.send(calls.delete_vm(ref, force=force))

    def start(self, ref: str, *, paused: bool = False) -> Operation:
        return self._client.send(calls.act_on_vm(ref, "start", {"paused": paused}))

    def stop(self, ref: str, *, force: bool = False, timeout_s: float = 60) -> Operation:
        return self._client.send(calls.act_on_vm(ref, "stop", calls.stop_body(force=force, timeout_s=timeout_s)))

    def restart(self, ref: str, *, force: bool = False, timeout_s: float = 60) -> Operation:
        return self._client.send(calls.act_on_vm(ref, "restart", calls.stop_body(force=force, timeout_s=timeout_s)))

    def reset(self, ref: str) -> Operation:
        return self._client.send(calls.act_on_vm(ref, "reset"))

    def pause(self, ref: str) -> Operation:
        return self._client.send(calls.act_on_vm(ref, "pause"))

    def resume(self, ref: str) -> Operation:
        return self._client.send(calls.act_on_vm(ref, "resume"))

    def exec(self, ref: str, command: Sequence[str], *, stdin: str | None = None, timeout_s: float = 30) -> ExecResult:
        """Run a command in the guest through its agent and return its exit code and output."""
        return self._client.send(calls.run_in_vm(ref, command, stdin, timeout_s))

    def logs(self, ref: str, *, lines: int | None = None) -> str:
        """Return the end of the serial console's log."""
        return self._client.send(calls.read_logs(ref, lines))

    def follow_logs(self, ref: str, *, lines: int | None = None) -> Iterator[bytes]:
        """Yield the log and what is added to it, until the server ends the stream."""
        with closing(self._client.open(calls.read_logs(ref, lines, follow=True))) as reply:
            yield from _until_cut(reply)

    def screenshot(self, ref: str) -> bytes:
        """Return the screen as PNG."""
        return self._client.send(calls.take_screenshot(ref))


class Images(Noun):
    """Images VMs start from."""

    def list(self, *, limit: int | None = None) -> "list[Image]":
        return self._client.collect("images", limit)

    def show(self, ref: str) -> Image:
        image: Image = self._client.send(calls.show("images", ref))
        return image

    def import_(self, body: Mapping[str, Any]) -> Operation:
        """Ask for an image from a file on the server or a URL: ``{"name": …, "source": …}``."""
        return self._client.send(calls.import_image(body))

    def build(self, name: str, recipe: str) -> Operation:
        return self._client.send(calls.build_image({"name": name, "recipe": recipe}))

    def delete(self, ref: str) -> Operation:
        return self._client.send(calls.delete_image(ref))

    def export(self, ref: str, file: BinaryIO, *, image_format: str = "qcow2") -> int:
        """Write the image's bytes into ``file`` and return how many."""
        written = 0
        with closing(self._client.open(calls.export_image(ref, image_format))) as reply:
            for chunk in reply.chunks():
                written += file.write(chunk)
        return written


class Operations(Noun):
    """Long work: look at it, wait for it, cancel it."""

    def list(
        self, *, state: str | None = None, target: str | None = None, limit: int | None = None
    ) -> "list[Operation]":
        return self._client.collect("operations", limit, state=state, target=target)

    def show(self, ref: str) -> Operation:
        operation: Operation = self._client.send(calls.show("operations", ref))
        return operation

    def look(self, operation: Operation, wait_s: float) -> Operation:
        """Return the operation as it is at its end, or after ``wait_s`` at the latest (300 at most)."""
        return self._client.send(calls.wait_operation(operation["id"], wait_s))

    def cancel(self, ref: str) -> Operation:
        return self._client.send(calls.cancel_operation(ref))

    def wait(
        self,
        operation: Operation | str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[Operation], None] | None = None,
    ) -> Operation:
        """Return the operation once it is done; a daemon that restarts meanwhile is waited for.

        With ``on_progress`` it is looked at every second. Raises OperationFailed when it ends otherwise, WaitTimeout
        when it is not over after ``timeout_s``, ApiError, ServerUnreachable.
        """
        latest = self.show(operation) if isinstance(operation, str) else operation
        start = heard = time.monotonic()
        while latest["state"] not in FINAL_STATES:
            if on_progress:
                on_progress(latest)
            now = time.monotonic()
            if timeout_s is not None and now - start >= timeout_s:
                raise WaitTimeout(dict(latest), timeout_s)
            step_s = 1.0 if on_progress else 20.0
            if timeout_s is not None:
                step_s = min(step_s, start + timeout_s - now)
            try:
                latest = self.look(latest, step_s)
                heard = time.monotonic()
            except ServerUnreachable:
                if time.monotonic() - heard > PATIENCE_S:
                    raise
                time.sleep(0.2)
        if on_progress:
            on_progress(latest)
        check_ended_well(dict(latest))
        return latest


class Events(Noun):
    """What happened, and what happens."""

    def history(self, *, limit: int | None = None) -> "list[Event]":
        return self._client.collect("events/history", limit)

    def follow(self, after: int | str = "now") -> Iterator[Event]:
        """Yield events as they come, resuming after the last one seen when the connection breaks.

        ``after`` is a sequence number, or ``now`` for new ones only. Raises ApiError, and ServerUnreachable when the
        server cannot be reached at first or stays away for 30 s.
        """
        position = after
        heard: float | None = None
        while True:
            decoder = EventDecoder()
            try:
                with closing(self._client.open(calls.follow_events(position))) as reply:
                    heard = time.monotonic()
                    for chunk in _until_cut(reply):
                        for event in decoder.feed(chunk):
                            position = event["seq"]
                            yield event
                        heard = time.monotonic()
            except (ServerUnreachable, ApiError) as error:
                if heard is None or time.monotonic() - heard > PATIENCE_S:
                    raise
                if isinstance(error, ApiError) and error.status < 500:
                    raise
            time.sleep(0.2)


class Projects(Noun):
    """Projects: the tenants."""

    def list(self, *, limit: int | None = None) -> "list[Project]":
        return self._client.collect("projects", limit)

    def create(self, name: str) -> Project:
        return self._client.send(calls.create_project(name))

    def delete(self, ref: str) -> None:
        self._client.send(calls.delete_project(ref))


class Tokens(Noun):
    """Bearer tokens."""

    def list(self, *, limit: int | None = None) -> "list[Token]":
        return self._client.collect("tokens", limit)

    def create(self, name: str, *, role: str = "member", project: str | None = "default") -> Token:
        """Return the new token; its ``secret`` is shown this once."""
        return self._client.send(calls.create_token(name, role, project))

    def delete(self, ref: str) -> None:
        self._client.send(calls.delete_token(ref))


class Host(Noun):
    """The host the server runs on."""

    def show(self) -> Json:
        return self._client.send(calls.read_host())

    def doctor(self) -> "list[Json]":
        return self._client.send(calls.examine_host())


def _until_cut(reply: Reply) -> Iterator[bytes]:
    """Yield the chunks of a stream; silence and a cut end it, as they carry no news."""
    try:
        yield from reply.chunks()
    except ServerUnreachable:
        return
