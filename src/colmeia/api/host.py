"""The host over HTTP: facts, doctor, health and metrics."""

import anyio.to_thread
from fastapi import APIRouter, Response
from prometheus_client.core import CollectorRegistry, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import Table, func, select

from colmeia import __version__
from colmeia.api.edge import Caller, TheServices, problems, rendered
from colmeia.control.identity import require
from colmeia.host.doctor import examine
from colmeia.model.base import Model
from colmeia.model.host import Check, HostFacts
from colmeia.store import tables

router = APIRouter(tags=["host"])


class Health(Model):
    status: str
    version: str


@router.get("/healthz", response_model=Health, responses={503: problems()[503]})
async def health(services: TheServices) -> Response:
    """Answer when the daemon and its database work. Needs no token."""
    async with services.database.reading() as tx:
        await tx.execute(select(1))
    return rendered(Health(status="ok", version=__version__))


@router.get("/v1/host", response_model=HostFacts, responses=problems())
async def show_host(services: TheServices, identity: Caller) -> Response:
    """Show what was found out about this host when the daemon started."""
    require(identity, write=False)
    return rendered(services.facts)


@router.get("/v1/host/doctor", response_model=list[Check], responses=problems())
async def doctor(services: TheServices, identity: Caller) -> list[Check]:
    """Examine the host now."""
    require(identity, write=False)
    return list(await anyio.to_thread.run_sync(examine, services.facts))


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(),
    },
)
async def metrics(services: TheServices, identity: Caller) -> Response:
    """Figures for Prometheus."""
    require(identity, write=False, admin=True)
    registry = CollectorRegistry()
    registry.register(_Figures([await _counts(services, table) for table in (tables.vms, tables.operations)]))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Figures:
    """What was counted, in the shape prometheus-client asks for."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> list[GaugeMetricFamily]:
        return self._families


async def _counts(services: TheServices, table: Table) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"colmeia_{table.name}", f"Number of {table.name} by state.", labels=["state"])
    async with services.database.reading() as tx:
        for state, count in (await tx.execute(select(table.c.state, func.count()).group_by(table.c.state))).all():
            family.add_metric([state], count)
    return family
