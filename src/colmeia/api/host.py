"""The host over HTTP: facts, doctor, health and metrics."""

from collections.abc import Iterator, Mapping

import anyio.to_thread
from fastapi import APIRouter, Response
from prometheus_client.core import CollectorRegistry, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from colmeia import __version__
from colmeia.api.edge import Caller, TheServices, problems, rendered
from colmeia.control.identity import require
from colmeia.host.doctor import examine
from colmeia.model.base import Model
from colmeia.model.host import Check, HostFacts
from colmeia.store import history

router = APIRouter(tags=["host"])


class Health(Model):
    status: str
    version: str


@router.get("/healthz", response_model=Health, responses={503: problems()[503]})
async def health(services: TheServices) -> Response:
    """Answer when the daemon and its database work. Needs no token."""
    await services.database.ping()
    return rendered(Health(status="ok", version=__version__))


@router.get("/v1/host", response_model=HostFacts, responses=problems())
async def show_host(services: TheServices, _identity: Caller) -> Response:
    """Show what was found out about this host when the daemon started."""
    return rendered(services.facts)


@router.get("/v1/host/doctor", response_model=list[Check], responses=problems())
async def doctor(services: TheServices, _identity: Caller) -> list[Check]:
    """Examine the host now."""
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
    async with services.database.reading() as tx:
        registry.register(_Figures(await history.count_by_state(tx)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Figures:
    """What was counted, in the shape prometheus-client asks for."""

    def __init__(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for noun, by_state in self._counts.items():
            family = GaugeMetricFamily(f"colmeia_{noun}", f"Number of {noun} by state.", labels=["state"])
            for state, count in by_state.items():
                family.add_metric([state], count)
            yield family
