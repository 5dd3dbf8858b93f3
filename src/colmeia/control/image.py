"""Images: import, build, delete."""

from collections.abc import Awaitable, Callable

from colmeia.control.operations import Finish, Handler, Job
from colmeia.control.services import Services, now
from colmeia.model.base import new_id
from colmeia.model.errors import Conflict
from colmeia.model.identity import Identity
from colmeia.model.image import DirectBoot, Image, ImageBuild, ImageImport, ImageState
from colmeia.model.operation import Operation
from colmeia.storage.interface import StoredImage
from colmeia.store import documents, links
from colmeia.store.database import Connection


async def request_import(
    services: Services, tx: Connection, identity: Identity, project: str, wish: ImageImport
) -> Operation:
    """Write the image and the operation that fetches it. Raises Conflict (`name_taken`)."""
    arguments = wish.model_dump(mode="json")
    return await _request(services, tx, identity, project, wish.name, wish.source, wish.os, "image.import", arguments)


async def request_build(
    services: Services, tx: Connection, identity: Identity, project: str, wish: ImageBuild
) -> Operation:
    services.images.check_recipe(wish.recipe)
    arguments = wish.model_dump(mode="json")
    source = f"build:{wish.recipe}"
    return await _request(services, tx, identity, project, wish.name, source, wish.recipe, "image.build", arguments)


async def request_delete(
    services: Services, tx: Connection, identity: Identity, project: str, name_or_id: str
) -> Operation:
    """Raises Conflict (`image_in_use`) while VMs are its children."""
    image = await documents.images.get(tx, name_or_id, project=project)
    users = await links.vms_of_image(tx, image.id)
    if users:
        raise Conflict(
            "image_in_use",
            f"Image {image.name} cannot be deleted: {len(users)} VMs are its children ({', '.join(users[:5])}).",
            "Delete those VMs first.",
        )
    operation = await services.operations.submit(
        tx, kind="image.delete", project=project, target=("image", image.id, image.name), requested_by=identity.name
    )
    await documents.images.replace(tx, image.model_copy(update={"state": ImageState.DELETING}))
    return operation


async def _request(
    services: Services,
    tx: Connection,
    identity: Identity,
    project: str,
    name: str,
    source: str,
    os: str,
    kind: str,
    arguments: dict[str, object],
) -> Operation:
    await documents.projects.get(tx, project)
    image = Image(
        id=new_id(), project=project, name=name, state=ImageState.IMPORTING, source=source, os=os, created_at=now()
    )
    await documents.images.insert(tx, image)
    return await services.operations.submit(
        tx,
        kind=kind,
        project=project,
        target=("image", image.id, name),
        requested_by=identity.name,
        arguments=arguments,
    )


def register(services: Services) -> None:
    """Teach the operations how images are made and unmade."""

    def filled(
        fill: Callable[[Job], Awaitable[StoredImage]],
    ) -> Callable[[Job], Awaitable[Finish | None]]:
        async def run(job: Job) -> Finish:
            stored = await fill(job)

            async def finish(tx: Connection) -> None:
                image = await documents.images.get(tx, job.target_id)
                boot = None if stored.boot is None else DirectBoot(arguments=stored.boot.arguments)
                ready = image.model_copy(
                    update={
                        "state": ImageState.READY,
                        "virtual_size": stored.virtual_size,
                        "stored_size": stored.stored_size,
                        "sha256": stored.sha256,
                        "direct_boot": boot,
                        "revision": image.revision + 1,
                    }
                )
                await documents.images.replace(tx, ready)

            return finish

        return run

    async def fetch(job: Job) -> StoredImage:
        wish = ImageImport.model_validate(job.operation.arguments)
        return await services.images.import_image(
            job.target_id, wish.source, format=wish.format, sha256=wish.sha256, progress=job.progress
        )

    async def build(job: Job) -> StoredImage:
        return await services.images.build(job.target_id, job.operation.arguments["recipe"], progress=job.progress)

    async def discard(job: Job) -> None:
        await services.images.delete(job.target_id)
        async with services.database.transaction() as tx:
            await documents.images.remove(tx, job.target_id)

    async def delete(job: Job) -> Finish:
        await services.images.delete(job.target_id)

        async def finish(tx: Connection) -> None:
            await documents.images.remove(tx, job.target_id)

        return finish

    services.operations.register("image.import", Handler(filled(fetch), undo=discard))
    services.operations.register("image.build", Handler(filled(build), undo=discard))
    services.operations.register("image.delete", Handler(delete, is_cancellable=False))
