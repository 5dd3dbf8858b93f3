"""The async client, over httpx2 and anyio: the same requests as the sync one, and the consoles.

Every method may be cancelled at any time; a cancelled change may have reached the server. One client serves many tasks.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio
import httpx2
from httpx2.websockets import (
    AsyncWebSocketSession,
    WebSocketDisconnect,
    WebSocketInvalidTypeReceived,
    WebSocketNetworkError,
    WebSocketUpgradeError,
)

from colmeia.client import call as calls
from colmeia.client.address import Address, find_address
from colmeia.client.call import FINAL_STATES, RETRY_DELAYS_S, Call, may_retry, prepare
from colmeia.client.errors import ApiError, ServerUnreachable, WaitTimeout, check_ended_well, problem_error
from colmeia.client.shapes import Event, ExecResult, Image, Json, Operation, Project, Token, Vm
from colmeia.client.sse import EventDecoder
from colmeia.client.sync import PATIENCE_S
from colmeia.client.wire import explain_transport, trusted_context

T = TypeVar("T")

POLICY_VIOLATION = 1008
"""Close code (RFC 6455, 7.4.1) with which the server refuses a console, its words in the reason."""


class AsyncClient:
    """A Colmeia server. ``project`` goes along with every request; absent, the server takes the caller's own."""

    def __init__(
        self, server: str | Address | None = None, *, token: str | None = None, project: str | None = None
    ) -> None:
        self.address = server if isinstance(server, Address) else find_address(server, token=token)
        self.project = project
        verify = trusted_context(self.address)
        transport = httpx2.AsyncHTTPTransport(uds=self.address.socket, verify=False) if self.address.socket else None
        self._http = httpx2.AsyncClient(base_url=self.address.url, verify=verify, transport=transport)
        self.vms = Vms(self)
        self.images = Images(self)
        self.operations = Operations(self)
        self.events = Events(self)
        self.projects = Projects(self)
        self.tokens = Tokens(self)
        self.host = Host(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let the connections go. Idempotent."""
        await self._http.aclose()

    async def whoami(self) -> Json:
        """Return the identity the server sees."""
        return await self.send(calls.who_am_i())

    async def send(self, call: Call[T]) -> T:
        """Send and return the result. Raises ApiError, ServerUnreachable."""
        request = prepare(call, self.address, self.project)
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                response = await self._http.request(
                    request.method,
                    request.target,
                    content=request.body,
                    headers=request.headers,
                    timeout=request.timeout_s,
                )
            except httpx2.TransportError as error:
                failure = explain_transport(self.address, error)
                if delay_s is None or not may_retry(call, failure):
                    raise failure from error
                await anyio.sleep(delay_s)
                continue
            if response.status_code >= 300:
                raise problem_error(response.status_code, response.content)
            return call.answer(response.content)
        raise AssertionError("the last attempt returns or raises")

    @asynccontextmanager
    async def open(self, call: Call[Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send and hand out the body as it comes, for streams. Raises ApiError, ServerUnreachable; retries nothing."""
        request = prepare(call, self.address, self.project)
        try:
            async with self._http.stream(
                request.method, request.target, headers=request.headers, timeout=request.timeout_s
            ) as response:
                if response.status_code >= 300:
                    raise problem_error(response.status_code, await response.aread())
                yield response.aiter_bytes()
        except httpx2.TransportError as error:
            raise explain_transport(self.address, error) from error

    @asynccontextmanager
    async def dial(self, call: Call[Any]) -> AsyncIterator["Console"]:
        """Open a WebSocket. Raises ApiError when the server refuses it, ServerUnreachable."""
        request = prepare(call, self.address, self.project)
        del request.headers["Accept"]
        try:
            async with self._http.websocket(request.target, headers=request.headers, timeout=None) as session:
                yield Console(self.address, session)
        except WebSocketUpgradeError as error:
            raise problem_error(error.response.status_code, await error.response.aread()) from error
        except httpx2.TransportError as error:
            raise explain_transport(self.address, error) from error

    async def collect(self, noun: str, limit: int | None, **query: str | int | None) -> list[Any]:
        """Return the whole list, page by page, or its first ``limit``."""
        items: list[Any] = []
        cursor: str | None = None
        while True:
            rest = None if limit is None else min(limit - len(items), calls.PAGE_MAX)
            page = await self.send(calls.list_page(noun, **query, limit=rest, cursor=cursor))
            items += page["items"]
            cursor = page["next"]
            if cursor is None or (limit is not None and len(items) >= limit):
                return items[:limit]


class Console:
    """An open console: bytes both ways.

    Iterate it for what the guest says, until either side hangs up; ApiError when the server refused it.
    """

    def __init__(self, address: Address, session: AsyncWebSocketSession) -> None:
        self._address = address
        self._session = session

    async def send(self, data: bytes) -> None:
        """Hand bytes to the guest. Raises ServerUnreachable when the console is gone."""
        try:
            await self._session.send_bytes(data)
        except (WebSocketNetworkError, WebSocketDisconnect) as error:
            raise ServerUnreachable(str(self._address), "the console closed", is_sent=True) from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                yield await self._session.receive_bytes()
            except WebSocketDisconnect as error:
                if error.code == POLICY_VIOLATION:
                    raise ApiError(409, "conflict", "console_refused", error.reason or "No console.") from error
                return
            except (WebSocketNetworkError, WebSocketInvalidTypeReceived):
                return


class Noun:
    """What the groups share: the client."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client


class Vms(Noun):
    """Virtual machines. ``ref`` is a name or an id."""

    async def list(self, *, state: str | None = None, limit: int | None = None) -> "list[Vm]":
        return await self._client.collect("vms", limit, state=state)

    async def show(self, ref: str) -> Vm:
        vm: Vm = await self._client.send(calls.show("vms", ref))
        return vm

    async def create(self, body: Mapping[str, Any]) -> Operation:
        """Ask for a VM: ``{"name": …, "spec": {…}, "start": bool}``. The operation's target is the VM."""
        return await self._client.send(calls.create_vm(body))

    async def update(self, ref: str, changes: Mapping[str, Any], *, if_match: int | None = None) -> Vm:
        """Change fields of the spec, only if its revision still is ``if_match`` when that is given."""
        return await self._client.send(calls.update_vm(ref, changes, if_match))

    async def delete(self, ref: str, *, force: bool = False) -> Operation:
        return await self._client.send(calls.delete_vm(ref, force=force))

    async def start(self, ref: str, *, paused: bool = False) -> Operation:
        return await self._client.send(calls.act_on_vm(ref, "start", {"paused": paused}))

    async def stop(self, ref: str, *, force: bool = False, timeout_s: float = 60) -> Operation:
        return await self._client.send(calls.act_on_vm(ref, "stop", calls.stop_body(force=force, timeout_s=timeout_s)))

    async def restart(self, ref: str, *, force: bool = False, timeout_s: float = 60) -> Operation:
        return await self._client.send(
            calls.act_on_vm(ref, "restart", calls.stop_body(force=force, timeout_s=timeout_s))
        )

    async def reset(self, ref: str) -> Operation:
        return await self._client.send(calls.act_on_vm(ref, "reset"))

    async def pause(self, ref: str) -> Operation:
        return await self._client.send(calls.act_on_vm(ref, "pause"))

    async def resume(self, ref: str) -> Operation:
        return await self._client.send(calls.act_on_vm(ref, "resume"))

    async def exec(
        self, ref: str, command: Sequence[str], *, stdin: str | None = None, timeout_s: float = 30
    ) -> ExecResult:
        """Run a command in the guest through its agent and return its exit code and output."""
        return await self._client.send(calls.run_in_vm(ref, command, stdin, timeout_s))

    async def logs(self, ref: str, *, lines: int | None = None) -> str:
        """Return the end of the serial console's log."""
        return await self._client.send(calls.read_logs(ref, lines))

    async def follow_logs(self, ref: str, *, lines: int | None = None) -> AsyncIterator[bytes]:
        """Yield the log and what is added to it, until the server ends the stream."""
        async with self._client.open(calls.read_logs(ref, lines, follow=True)) as chunks:
            async for chunk in _until_cut(chunks):
                yield chunk

    async def screenshot(self, ref: str) -> bytes:
        """Return the screen as PNG."""
        return await self._client.send(calls.take_screenshot(ref))

    def console(self, ref: str, kind: Literal["serial", "vnc"] = "serial") -> AbstractAsyncContextManager[Console]:
        """Open the serial console, or the screen as RFB for a VNC viewer: ``async with vms.console("web1") as c``."""
        return self._client.dial(calls.open_console(ref, kind))


class Images(Noun):
    """Images VMs start from."""

    async def list(self, *, limit: int | None = None) -> "list[Image]":
        return await self._client.collect("images", limit)

    async def show(self, ref: str) -> Image:
        image: Image = await self._client.send(calls.show("images", ref))
        return image

    async def import_(self, body: Mapping[str, Any]) -> Operation:
        """Ask for an image from a file on the server or a URL: ``{"name": …, "source": …}``."""
        return await self._client.send(calls.import_image(body))

    async def build(self, name: str, recipe: str) -> Operation:
        return await self._client.send(calls.build_image({"name": name, "recipe": recipe}))

    async def delete(self, ref: str) -> Operation:
        return await self._client.send(calls.delete_image(ref))

    async def export(self, ref: str, *, image_format: str = "qcow2") -> AsyncIterator[bytes]:
        """Yield the image's bytes."""
        async with self._client.open(calls.export_image(ref, image_format)) as chunks:
            async for chunk in chunks:
                yield chunk


class Operations(Noun):
    """Long work: look at it, wait for it, cancel it."""

    async def list(
        self, *, state: str | None = None, target: str | None = None, limit: int | None = None
    ) -> "list[Operation]":
        return await self._client.collect("operations", limit, state=state, target=target)

    async def show(self, ref: str) -> Operation:
        operation: Operation = await self._client.send(calls.show("operations", ref))
        return operation

    async def look(self, operation: Operation, wait_s: float) -> Operation:
        """Return the operation as it is at its end, or after ``wait_s`` at the latest (300 at most)."""
        return await self._client.send(calls.wait_operation(operation["id"], wait_s))

    async def cancel(self, ref: str) -> Operation:
        return await self._client.send(calls.cancel_operation(ref))

    async def wait(
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
        latest = await self.show(operation) if isinstance(operation, str) else operation
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
                latest = await self.look(latest, step_s)
                heard = time.monotonic()
            except ServerUnreachable:
                if time.monotonic() - heard > PATIENCE_S:
                    raise
                await anyio.sleep(0.2)
        if on_progress:
            on_progress(latest)
        check_ended_well(dict(latest))
        return latest


class Events(Noun):
    """What happened, and what happens."""

    async def history(self, *, limit: int | None = None) -> "list[Event]":
        return await self._client.collect("events/history", limit)

    async def follow(self, after: int | str = "now") -> AsyncIterator[Event]:
        """Yield events as they come, resuming after the last one seen when the connection breaks.

        ``after`` is a sequence number, or ``now`` for new ones only. Raises ApiError, and ServerUnreachable when the
        server cannot be reached at first or stays away for 30 s.
        """
        position = after
        heard: float | None = None
        while True:
            decoder = EventDecoder()
            try:
                async with self._client.open(calls.follow_events(position)) as chunks:
                    heard = time.monotonic()
                    async for chunk in _until_cut(chunks):
                        for event in decoder.feed(chunk):
                            position = event["seq"]
                            yield event
                        heard = time.monotonic()
            except (ServerUnreachable, ApiError) as error:
                if heard is None or time.monotonic() - heard > PATIENCE_S:
                    raise
                if isinstance(error, ApiError) and error.status < 500:
                    raise
            await anyio.sleep(0.2)


class Projects(Noun):
    """Projects: the tenants."""

    async def list(self, *, limit: int | None = None) -> "list[Project]":
        return await self._client.collect("projects", limit)

    async def create(self, name: str) -> Project:
        return await self._client.send(calls.create_project(name))

    async def delete(self, ref: str) -> None:
        await self._client.send(calls.delete_project(ref))


class Tokens(Noun):
    """Bearer tokens."""

    async def list(self, *, limit: int | None = None) -> "list[Token]":
        return await self._client.collect("tokens", limit)

    async def create(self, name: str, *, role: str = "member", project: str | None = "default") -> Token:
        """Return the new token; its ``secret`` is shown this once."""
        return await self._client.send(calls.create_token(name, role, project))

    async def delete(self, ref: str) -> None:
        await self._client.send(calls.delete_token(ref))


class Host(Noun):
    """The host the server runs on."""

    async def show(self) -> Json:
        return await self._client.send(calls.read_host())

    async def doctor(self) -> "list[Json]":
        return await self._client.send(calls.examine_host())


async def _until_cut(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream; silence and a cut end it, as they carry no news."""
    try:
        async for chunk in chunks:
            yield chunk
    except httpx2.TransportError:
        return
