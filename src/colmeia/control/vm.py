"""Virtual machines: what may be asked of one, and carrying it out.

The way of a change: `request_*` checks and writes the wish and its operation in one transaction; the operation's
function ensures, step by step, that the wish holds; `set_state` is the only place where a VM's state is written.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import structlog

from colmeia.control.operations import Finish, Handler, Job
from colmeia.control.services import Services, now
from colmeia.engine.interface import LaunchRequest, OpenDisk
from colmeia.model.base import new_id
from colmeia.model.block import BlockSource
from colmeia.model.errors import Conflict, Internal, Invalid, PreconditionFailed, Unavailable
from colmeia.model.identity import Identity
from colmeia.model.image import ImageState
from colmeia.model.operation import Operation
from colmeia.model.vm import (
    VM_TRANSITIONS,
    Action,
    CrashPolicy,
    Died,
    Firmware,
    Runtime,
    Vm,
    VmCreate,
    VmPatch,
    VmState,
    check_action,
    check_fits,
    mac_for,
)
from colmeia.storage.seed import build_seed
from colmeia.store import documents, history, links
from colmeia.store.database import Connection
from colmeia.store.links import Volume

log = structlog.get_logger()

START_DEADLINE_S = 30.0
CRASHES_BEFORE_GIVING_UP = 5
CRASH_WINDOW = timedelta(minutes=10)


# ── what may be asked ────────────────────────────────────────────────────────────────────────────────────────────


async def request_create(
    services: Services, tx: Connection, identity: Identity, project: str, wish: VmCreate
) -> Operation:
    """Write a new VM and the operation that makes it.

    Raises Conflict (name taken, larger than the host, image not ready), NotFound (image), Invalid (disk smaller than
    its image, machine that cannot do what is asked).
    """
    check_fits(wish.spec, cpus=services.facts.cpus, memory_bytes=services.facts.memory_bytes)
    await documents.projects.get(tx, project)
    vm_id = new_id()
    volumes = []
    for disk in wish.spec.disks:
        image_id = None
        if disk.image is not None:
            image = await documents.images.get(tx, disk.image, project=project)
            if image.state is not ImageState.READY:
                raise Conflict(
                    "image_not_ready", f"Image {image.name} is {image.state.value}.", "Wait until it is ready."
                )
            if disk.size is not None and disk.size < image.virtual_size:
                raise Invalid(
                    "disk_smaller_than_image",
                    f"Disk {disk.name} was asked with {disk.size} bytes; image {image.name} has {image.virtual_size}.",
                    "Leave the size out, or ask for at least the image's.",
                )
            image_id = image.id
        volumes.append(Volume(f"{vm_id}-{disk.name}", disk.name, image_id))
    vm = Vm(
        id=vm_id,
        project=project,
        name=wish.name,
        spec=wish.spec,
        state=VmState.CREATING,
        desired=VmState.RUNNING if wish.start else VmState.STOPPED,
        uid=await links.free_uid(tx, services.uid_base),
        created_at=now(),
    )
    await documents.vms.insert(tx, vm)
    for volume in volumes:
        await links.add_volume(tx, vm_id, volume)
    return await _submit(services, tx, identity, vm, "vm.create", {"start": wish.start})


async def request_action(
    services: Services,
    tx: Connection,
    identity: Identity,
    project: str,
    name_or_id: str,
    action: Action,
    arguments: dict[str, Any],
) -> Operation:
    """Write what is wanted of a VM now. Raises Conflict when its state does not allow it, Busy when it is worked on."""
    vm = await documents.vms.get(tx, name_or_id, project=project)
    forced_delete = action is Action.DELETE and arguments.get("force") and vm.state is not VmState.CREATING
    operation = await _submit(services, tx, identity, vm, f"vm.{action.value}", arguments)
    if not forced_delete:
        check_action(vm.name, vm.state, action)
    desired = {
        Action.START: VmState.PAUSED if arguments.get("paused") else VmState.RUNNING,
        Action.RESUME: VmState.RUNNING,
        Action.RESTART: VmState.RUNNING,
        Action.PAUSE: VmState.PAUSED,
        Action.STOP: VmState.STOPPED,
        Action.DELETE: VmState.STOPPED,
    }.get(action, vm.desired)
    transient = {
        Action.START: VmState.STARTING,
        Action.STOP: VmState.STOPPING,
        Action.RESTART: VmState.STOPPING,
        Action.DELETE: VmState.DELETING,
    }.get(action)
    vm = vm.model_copy(update={"desired": desired})
    if transient is None or transient is vm.state:
        await documents.vms.replace(tx, vm)
    else:
        await set_state(tx, vm, transient)
    return operation


async def change(
    services: Services, project: str, name_or_id: str, patch: VmPatch, *, expected_revision: int | None
) -> Vm:
    """Change the spec. It holds from the next start. Raises PreconditionFailed when someone else was faster."""
    async with services.database.transaction() as tx:
        vm = await documents.vms.get(tx, name_or_id, project=project)
        if expected_revision is not None and expected_revision != vm.revision:
            raise PreconditionFailed(
                "revision_changed",
                f"VM {vm.name} is at revision {vm.revision}, not {expected_revision}.",
                "Read it again.",
            )
        update = patch.model_dump(exclude_unset=True, exclude_none=True)
        spec = type(vm.spec).model_validate(vm.spec.model_dump() | update)
        check_fits(spec, cpus=services.facts.cpus, memory_bytes=services.facts.memory_bytes)
        if spec == vm.spec:
            return vm
        vm = vm.model_copy(update={"spec": spec, "revision": vm.revision + 1})
        await documents.vms.replace(tx, vm)
        await _tell(tx, vm, "vm.changed", {"revision": vm.revision, "fields": sorted(update)})
        return vm


async def set_state(tx: Connection, vm: Vm, state: VmState, **update: Any) -> Vm:
    """Write a VM's state: the one place. Raises Internal for a move the table does not know."""
    if state is not vm.state and state not in VM_TRANSITIONS[vm.state]:
        raise Internal("vm_transition", f"VM {vm.name} cannot go from {vm.state.value} to {state.value}.")
    changed = vm.model_copy(update={"state": state, **update})
    await documents.vms.replace(tx, changed)
    if state is not vm.state:
        log.info("vm.state", vm=vm.name, old=vm.state.value, new=state.value)
        await _tell(tx, changed, "vm.state", {"old": vm.state.value, "new": state.value})
    return changed


# ── carrying it out ──────────────────────────────────────────────────────────────────────────────────────────────


def register(services: Services) -> None:
    """Teach the operations how VMs are made, moved between states and unmade."""
    work = _Work(services)
    kinds = {
        "vm.create": Handler(work.create, undo=work.discard),
        "vm.start": Handler(work.start, undo=work.undo_start),
        "vm.stop": Handler(work.stop, undo=work.settle),
        "vm.restart": Handler(work.restart, undo=work.settle),
        "vm.reset": Handler(work.reset, undo=work.settle),
        "vm.pause": Handler(work.pause, undo=work.settle),
        "vm.resume": Handler(work.resume, undo=work.settle),
        "vm.delete": Handler(work.delete, is_cancellable=False),
    }
    for kind, handler in kinds.items():
        services.operations.register(kind, handler)


class _Work:
    """The functions behind the operations. Each may be run again from its start."""

    def __init__(self, services: Services) -> None:
        self._s = services

    async def create(self, job: Job) -> Finish:
        vm = await self._vm(job)
        job.progress(0.0, "making disks")
        await self._ensure_files(vm)
        if not job.operation.arguments.get("start"):
            return self._becomes(vm, VmState.STOPPED)
        async with self._s.database.transaction() as tx:
            vm = await set_state(tx, vm, VmState.STARTING)
        return await self._launch(vm, paused=False)

    async def start(self, job: Job) -> Finish:
        vm = await self._vm(job)
        return await self._launch(vm, paused=bool(job.operation.arguments.get("paused")))

    async def stop(self, job: Job) -> Finish:
        vm = await self._vm(job)
        await self._stop(vm, job)
        return self._becomes(vm, VmState.STOPPED, runtime=Runtime())

    async def restart(self, job: Job) -> Finish:
        vm = await self._vm(job)
        if vm.state is VmState.STOPPING:
            await self._stop(vm, job)
            async with self._s.database.transaction() as tx:
                vm = await set_state(tx, vm, VmState.STARTING)
        return await self._launch(vm, paused=False)

    async def reset(self, job: Job) -> None:
        await self._s.engine.reset(job.target_id)

    async def pause(self, job: Job) -> Finish:
        await self._s.engine.pause(job.target_id)
        return self._becomes(await self._vm(job), VmState.PAUSED)

    async def resume(self, job: Job) -> Finish:
        await self._s.engine.resume(job.target_id)
        return self._becomes(await self._vm(job), VmState.RUNNING)

    async def delete(self, job: Job) -> Finish:
        await self._remove_files(await self._vm(job))

        async def finish(tx: Connection) -> None:
            await documents.vms.remove(tx, job.target_id)

        return finish

    async def discard(self, job: Job) -> None:
        """Undo a creation: nothing of it stays, and its name is free again."""
        await self._remove_files(await self._vm(job))
        async with self._s.database.transaction() as tx:
            await documents.vms.remove(tx, job.target_id)

    async def undo_start(self, job: Job) -> None:
        await self._s.engine.kill(job.target_id)
        await self.settle(job)

    async def settle(self, job: Job) -> None:
        """Write down what the VM really is."""
        await settle(self._s, job.target_id)

    async def _vm(self, job: Job) -> Vm:
        async with self._s.database.reading() as tx:
            return await documents.vms.get(tx, job.target_id)

    def _becomes(self, vm: Vm, state: VmState, **update: Any) -> Finish:
        async def finish(tx: Connection) -> None:
            await set_state(tx, await documents.vms.get(tx, vm.id), state, **update)

        return finish

    async def _launch(self, vm: Vm, *, paused: bool) -> Finish:
        request = await self._launch_request(vm, paused=paused)
        runtime = await self._s.engine.start(request, deadline_s=START_DEADLINE_S)
        for warning in runtime.warnings:
            log.warning("vm.warning", vm=vm.name, warning=warning)
        return self._becomes(vm, VmState.PAUSED if paused else VmState.RUNNING, runtime=runtime, died=None)

    async def _stop(self, vm: Vm, job: Job) -> None:
        arguments = job.operation.arguments
        if not arguments.get("force"):
            timeout_s = float(arguments.get("timeout_s", 60.0))
            try:
                await self._s.engine.resume(vm.id)  # a guest that stands cannot hear the button
                await self._s.engine.press_power_button(vm.id)
            except Unavailable:
                log.info("vm.power_button_unavailable", vm=vm.name)
                timeout_s = 0.0
            job.progress(0.1, f"waiting up to {timeout_s:.0f} s for the guest to power off")
            if await self._s.engine.wait_gone(vm.id, timeout_s=timeout_s):
                return
            job.progress(0.9, "the guest did not power off: ending it")
        await self._s.engine.kill(vm.id)

    async def _ensure_files(self, vm: Vm) -> None:
        for disk, volume in await self._volumes(vm):
            await self._ensure_volume(vm, disk, volume)
        folder = self._s.vm_dir / vm.id
        await anyio.Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        if vm.spec.cloud_init is not None:
            macs = [nic.mac or mac_for(vm.id, index) for index, nic in enumerate(vm.spec.nics)]
            seed = build_seed(vm.id, vm.name, vm.spec.cloud_init, macs)
            await _write_whole(folder / "seed.iso", seed)
        if vm.spec.firmware is Firmware.UEFI:
            if not self._s.facts.ovmf_vars:
                raise Unavailable("ovmf_missing", "UEFI firmware is not installed.", "apt-get install ovmf")
            if not (folder / "uefi-vars.fd").exists():
                template = await anyio.Path(self._s.facts.ovmf_vars).read_bytes()
                await _write_whole(folder / "uefi-vars.fd", template)

    async def _ensure_volume(self, vm: Vm, disk: Any, volume: Volume) -> BlockSource:
        backing = None if volume.image_id is None else self._s.images.block_source(volume.image_id)
        size = disk.size
        if size is None and volume.image_id is not None:
            async with self._s.database.reading() as tx:
                size = (await documents.images.get(tx, volume.image_id)).virtual_size
        return await self._s.volumes.ensure_volume(volume.id, size_bytes=size, backing=backing)

    async def _volumes(self, vm: Vm) -> list[tuple[Any, Volume]]:
        async with self._s.database.reading() as tx:
            found = {volume.disk: volume for volume in await links.volumes_of(tx, vm.id)}
        return [(disk, found[disk.name]) for disk in vm.spec.disks]

    async def _launch_request(self, vm: Vm, *, paused: bool) -> LaunchRequest:
        folder = self._s.vm_dir / vm.id
        disks = []
        boot = None
        for disk, volume in await self._volumes(vm):
            backing = None if volume.image_id is None else self._s.images.block_source(volume.image_id)
            disks.append(OpenDisk(disk=disk, source=self._s.volumes.block_source(volume.id, backing=backing)))
            if boot is None and volume.image_id is not None and vm.spec.firmware in (None, Firmware.DIRECT):
                boot = self._s.images.boot_files(volume.image_id)
        return LaunchRequest(
            vm_id=vm.id,
            name=vm.name,
            uid=vm.uid,
            spec=vm.spec,
            disks=tuple(disks),
            boot=boot,
            paused=paused,
            seed=str(folder / "seed.iso") if vm.spec.cloud_init is not None else None,
            uefi_vars=str(folder / "uefi-vars.fd") if vm.spec.firmware is Firmware.UEFI else None,
        )

    async def _remove_files(self, vm: Vm) -> None:
        """Destroy in the order of rising regret: process, run folder, own files, disks."""
        await self._s.engine.kill(vm.id)
        await self._s.engine.forget(vm.id)
        folder = anyio.Path(self._s.vm_dir / vm.id)
        if await folder.exists():
            async for entry in folder.iterdir():
                await entry.unlink()
            await folder.rmdir()
        async with self._s.database.reading() as tx:
            volumes = await links.volumes_of(tx, vm.id)
        for volume in volumes:
            await self._s.volumes.delete_volume(volume.id)


# ── what is seen ─────────────────────────────────────────────────────────────────────────────────────────────────


async def settle(services: Services, vm_id: str, died: Died | None = None, *, was_expected: bool = True) -> None:
    """Look at the VM's process and write down what is true; restart it when it crashed and its policy says so.

    The caller keeps operations off the VM. Idempotent.
    """
    seen = await services.engine.observe(vm_id)
    restart: Operation | None = None
    async with services.database.transaction() as tx:
        vm = await documents.vms.find(tx, vm_id)
        if vm is None or vm.state in (VmState.CREATING, VmState.DELETING):
            return
        if seen.state is not VmState.STOPPED:
            await set_state(tx, vm, seen.state)
            return
        if vm.state in (VmState.STOPPED, VmState.CRASHED):
            return
        if was_expected:
            await set_state(tx, vm, VmState.STOPPED, died=died, runtime=Runtime(), desired=VmState.STOPPED)
            return
        vm = await set_state(tx, vm, VmState.CRASHED, died=died, runtime=Runtime())
        await _tell(tx, vm, "vm.crashed", {"reason": died.reason if died else "unknown"})
        restart = await _restart_after_crash(services, tx, vm)
    if restart is not None:
        services.operations.wake(restart)


async def _restart_after_crash(services: Services, tx: Connection, vm: Vm) -> Operation | None:
    if vm.spec.on_crash is not CrashPolicy.RESTART or vm.desired is VmState.STOPPED:
        return None
    crashes = await history.count_events(tx, object_id=vm.id, kind="vm.crashed", since=now() - CRASH_WINDOW)
    if crashes > CRASHES_BEFORE_GIVING_UP:
        log.error("vm.crash_loop", vm=vm.name, crashes=crashes)
        await _tell(tx, vm, "vm.crash_loop", {"crashes": crashes, "window_s": CRASH_WINDOW.total_seconds()})
        return None
    return await request_start_by_system(services, tx, vm, requested_by="crash-policy")


async def request_start_by_system(services: Services, tx: Connection, vm: Vm, *, requested_by: str) -> Operation | None:
    """Queue a start that no user asked for; None when the VM is already being worked on."""
    if await history.unfinished_of(tx, vm.id) is not None:
        return None
    operation = await services.operations.submit(
        tx, kind="vm.start", project=vm.project, target=("vm", vm.id, vm.name), requested_by=requested_by
    )
    await set_state(tx, vm, VmState.STARTING, desired=VmState.RUNNING)
    return operation


async def adopt_all(services: Services, *, host_rebooted: bool) -> None:
    """Take over what runs, write down what is true, start what starts with the host. Called before anything else."""
    async with services.database.reading() as tx:
        vms = await documents.vms.all(tx)
        busy = {operation.target_id for operation in await history.unfinished_operations(tx)}
    for vm in vms:
        seen = await services.engine.adopt(vm.id)
        if vm.id in busy:
            continue  # its operation runs again and looks for itself
        if seen.state is not VmState.STOPPED:
            log.info("vm.adopted", vm=vm.name, pid=seen.pid)
        is_down = vm.state in (VmState.STOPPED, VmState.CRASHED)
        gone = not is_down and seen.state is VmState.STOPPED
        reason = "the host was restarted" if host_rebooted else "QEMU ended while no daemon watched it"
        died = Died(at=now(), reason=reason) if gone else None
        if gone or seen.state not in (vm.state, VmState.STOPPED):
            await settle(services, vm.id, died, was_expected=host_rebooted or not gone)
        if host_rebooted and vm.spec.autostart and seen.state is VmState.STOPPED:
            async with services.database.transaction() as tx:
                current = await documents.vms.get(tx, vm.id)
                await request_start_by_system(services, tx, current, requested_by="autostart")


async def _submit(
    services: Services, tx: Connection, identity: Identity, vm: Vm, kind: str, arguments: dict[str, Any]
) -> Operation:
    return await services.operations.submit(
        tx,
        kind=kind,
        project=vm.project,
        target=("vm", vm.id, vm.name),
        requested_by=identity.name,
        arguments=arguments,
    )


async def _tell(tx: Connection, vm: Vm, kind: str, data: dict[str, Any]) -> None:
    await history.record_event(
        tx, at=now(), project=vm.project, kind=kind, object_kind="vm", object_id=vm.id, object_name=vm.name, data=data
    )


async def _write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    part = anyio.Path(f"{path}.part")
    await part.write_bytes(content)
    await part.rename(path)
