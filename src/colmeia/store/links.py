"""The small facts between nouns: a VM's volumes and their images, host uids, idempotency keys, token secrets."""

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import insert, select

from colmeia.model.identity import Token
from colmeia.store import tables
from colmeia.store.database import Connection

_vol = tables.volumes.c
_key = tables.idempotency_keys.c


class Volume(NamedTuple):
    """Where a VM's disk lives, and the image it is a child of."""

    id: str
    disk: str
    image_id: str | None


async def add_volume(tx: Connection, vm_id: str, volume: Volume) -> None:
    await tx.execute(
        insert(tables.volumes).values(id=volume.id, vm_id=vm_id, disk=volume.disk, image_id=volume.image_id)
    )


async def volumes_of(tx: Connection, vm_id: str) -> list[Volume]:
    rows = await tx.execute(select(_vol.id, _vol.disk, _vol.image_id).where(_vol.vm_id == vm_id))
    return [Volume(row.id, row.disk, row.image_id) for row in rows.all()]


async def vms_of_image(tx: Connection, image_id: str) -> list[str]:
    """Return the names of VMs whose disks are children of the image."""
    query = (
        select(tables.vms.c.name).join(tables.volumes, _vol.vm_id == tables.vms.c.id).where(_vol.image_id == image_id)
    )
    return sorted(set((await tx.scalars(query)).all()))


async def free_uid(tx: Connection, base: int) -> int:
    """Return the lowest host uid from ``base`` on that no VM has."""
    uid = base
    for taken in (await tx.scalars(select(tables.vms.c.uid).where(tables.vms.c.uid >= base).order_by("uid"))).all():
        if taken != uid:
            break
        uid += 1
    return uid


async def remembered(tx: Connection, caller: str, key: str) -> tuple[str, str] | None:
    """Return (request hash, operation id) of an earlier call with this idempotency key, or None."""
    query = select(_key.request_sha256, _key.operation_id).where(_key.caller == caller, _key.key == key)
    row = (await tx.execute(query)).first()
    return None if row is None else (row.request_sha256, row.operation_id)


async def remember(
    tx: Connection, caller: str, key: str, *, request_sha256: str, operation_id: str, at: datetime
) -> None:
    row = {"caller": caller, "key": key, "request_sha256": request_sha256, "operation_id": operation_id, "at": at}
    await tx.execute(insert(tables.idempotency_keys).values(**row))


async def token_by_secret(tx: Connection, secret_sha256: str) -> Token | None:
    query = select(tables.tokens.c.document).where(tables.tokens.c.secret_sha256 == secret_sha256)
    document = await tx.scalar(query)
    return None if document is None else Token.model_validate_json(document)
