"""The composition root: builds everything once, hands it down, and ends it in order.

The order of a start: lock the state folder, bring the schema up to date, adopt the VMs that run, then carry out what
was left unfinished, then answer requests. VMs never notice that the daemon goes or comes.
"""

import fcntl
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from colmeia.api.app import create_app
from colmeia.api.server import local_server, serve_until, tcp_server
from colmeia.control import identity, image, vm
from colmeia.control.operations import Operations
from colmeia.control.services import Services, now
from colmeia.engine.interface import OnExit, OnState
from colmeia.engine.qemu.engine import QemuEngine
from colmeia.host.certificate import ensure_certificate
from colmeia.host.facts import find_facts
from colmeia.model.errors import ColmeiaError, Conflict
from colmeia.model.vm import Died, VmState
from colmeia.settings import Settings
from colmeia.storage.directory import DirectoryPool
from colmeia.storage.images import ImageStore
from colmeia.store import history
from colmeia.store.database import Database, sqlite_url
from colmeia.store.migrate import ensure_schema

log = structlog.get_logger()

HOUSEKEEPING_S = 3600.0


class _Seen(NamedTuple):
    """What the engine told: a VM's QEMU ended, or stopped or continued by itself."""

    vm_id: str
    died: Died | None
    was_expected: bool


def run(settings: Settings) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises ColmeiaError when it cannot start."""
    _set_up_logging(settings.log_format)
    with _locked(settings.state_dir):
        anyio.run(_serve, settings)  # not uvloop: it hides the sockets that carry descriptors to QEMU


async def _serve(settings: Settings) -> None:
    settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    facts = await anyio.to_thread.run_sync(find_facts, settings.state_dir / "facts.json")
    log.info("host.facts", qemu=".".join(map(str, facts.qemu_version)), kvm=facts.kvm.usable, reason=facts.kvm.reason)
    database = Database(settings.database_url or sqlite_url(settings.state_dir / "colmeia.db"))
    news, seen = anyio.create_memory_object_stream[_Seen](10_000)
    try:
        await ensure_schema(database)
        services = Services(
            database=database,
            operations=Operations(database),
            engine=QemuEngine(facts, settings.run_dir / "vms", settings.state_dir / "logs", *_reporters(news)),
            volumes=DirectoryPool(settings.state_dir / "volumes"),
            images=ImageStore(settings.state_dir / "images", settings.cache_dir or settings.state_dir / "cache"),
            facts=facts,
            uid_base=settings.uid_base,
            vm_dir=settings.state_dir / "vms",
        )
        image.register(services)
        vm.register(services)
        await _live(settings, services, seen)
    finally:
        with anyio.CancelScope(shield=True):
            await database.aclose()


async def _live(settings: Settings, services: Services, seen: MemoryObjectReceiveStream[_Seen]) -> None:
    stop = anyio.Event()
    await identity.ensure_default_project(services)
    boot, noted = _boot_id(), settings.state_dir / "boot_id"
    await vm.adopt_all(services, host_rebooted=not noted.exists() or noted.read_text() != boot)
    noted.write_text(boot)  # only now: a daemon that dies before this still starts what starts with the host
    async with anyio.create_task_group() as tasks:
        try:
            await tasks.start(services.operations.run, name="operations")
            tasks.start_soon(_watch, services, seen, name="watch")
            tasks.start_soon(_keep_house, services, settings.keep_events_days, name="housekeeping")
            tasks.start_soon(_await_signal, stop, name="signals")
            await _answer(settings, services, stop)
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await services.engine.aclose()
    log.info("daemon.ended")


async def _answer(settings: Settings, services: Services, stop: anyio.Event) -> None:
    """Serve HTTP until the signal."""
    app = create_app(services)
    with ExitStack() as sockets:
        servers = [local_server(app, settings.socket)]
        sockets.callback(settings.socket.unlink, missing_ok=True)
        if settings.listen:
            host = settings.listen.rpartition(":")[0].strip("[]")
            certificate, key = settings.tls_certificate, settings.tls_key
            if certificate is None or key is None:
                certificate, key = ensure_certificate(settings.state_dir / "tls", host)
            servers.append(tcp_server(app, settings.listen, certificate, key))
        gc.collect()
        gc.freeze()  # what is loaded now stays: never scan it again
        log.info("daemon.ready", socket=str(settings.socket), listen=settings.listen or "-")
        async with anyio.create_task_group() as tasks:
            for server, bound in servers:
                sockets.callback(bound.close)
                tasks.start_soon(serve_until, server, bound, stop, name="http")


def _reporters(news: MemoryObjectSendStream[_Seen]) -> tuple[OnExit, OnState]:
    def on_exit(vm_id: str, died: Died, was_expected: bool) -> None:
        news.send_nowait(_Seen(vm_id, died, was_expected))

    def on_state(vm_id: str, _state: VmState) -> None:
        news.send_nowait(_Seen(vm_id, None, True))

    return on_exit, on_state


async def _watch(services: Services, seen: MemoryObjectReceiveStream[_Seen]) -> None:
    """Write down what the engine sees, each VM in turn with its operations."""
    async with anyio.create_task_group() as tasks:
        async for event in seen:
            tasks.start_soon(_settle, services, event, name=f"settle-{event.vm_id}")


async def _settle(services: Services, event: _Seen) -> None:
    try:
        async with services.operations.exclusive(event.vm_id):
            await vm.settle(services, event.vm_id, event.died, was_expected=event.was_expected)
    except ColmeiaError as error:
        log.error("vm.unsettled", vm=event.vm_id, error=str(error))


async def _keep_house(services: Services, keep_days: int) -> None:
    while True:
        async with services.database.transaction() as tx:
            await history.forget_before(tx, now() - timedelta(days=keep_days))
        await anyio.sleep(HOUSEKEEPING_S)


async def _await_signal(stop: anyio.Event) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("daemon.signal", signal=signal.Signals(number).name)
            stop.set()


def _boot_id() -> str:
    """Return which boot of the host this is (random(4), /proc/sys/kernel/random)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Keep a second daemon off the same state. Raises Conflict (`daemon_running`)."""
    state_dir.mkdir(parents=True, exist_ok=True)
    state_dir.chmod(0o700)  # QEMU needs no way in: every file is handed to it open
    descriptor = os.open(state_dir / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(
                "daemon_running", f"Another daemon uses {state_dir}.", "Stop it first, or set COLMEIA_STATE_DIR."
            ) from error
        yield
    finally:
        os.close(descriptor)


def _set_up_logging(style: str) -> None:
    rendering = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            rendering,
        ],
        cache_logger_on_first_use=True,
    )
