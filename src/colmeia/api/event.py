"""Events over HTTP: a resumable stream, and the history."""

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from colmeia.api.edge import Caller, Limit, Page, TheServices, page, problems
from colmeia.control.services import Services
from colmeia.model.errors import Invalid
from colmeia.model.event import Event
from colmeia.store import history

router = APIRouter(prefix="/v1/events", tags=["event"], responses=problems())
HEARTBEAT_S = 15.0
BATCH = 200


@router.get(
    "",
    response_class=Response,
    responses={
        200: {"description": "Events as they happen.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    },
)
async def stream_events(
    services: TheServices,
    identity: Caller,
    after: Annotated[
        str, Query(pattern=r"^(now|\d{1,18})$", description="Sequence number to resume behind, or `now`.")
    ] = "now",
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> Response:
    """Follow events. A reader that reconnects with Last-Event-ID misses nothing."""
    position = last_event_id or after
    if position == "now":
        async with services.database.reading() as tx:
            seq = await history.last_seq(tx)
    elif position.isascii() and position.isdigit():
        seq = int(position)
    else:
        raise Invalid(
            "last_event_id", "Last-Event-ID is not a sequence number.", "Send the id of the last event you saw."
        )
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(services, identity.project, seq), media_type="text/event-stream", headers=headers)


@router.get("/history", response_model=Page[Event])
async def list_events(
    services: TheServices, identity: Caller, limit: Limit = 100, after: Annotated[int, Query(ge=0, le=2**62)] = 0
) -> Response:
    """List past events, newest first."""
    async with services.database.reading() as tx:
        events = await history.events_after(tx, after, project=identity.project, limit=limit, newest_first=True)
    return page([event.model_dump_json() for event in events], None)


async def _stream(services: Services, project: str | None, seq: int) -> AsyncIterator[str]:
    yield ": colmeia events\n\n"
    while True:
        change = services.database.change()
        async with services.database.reading() as tx:
            events = await history.events_after(tx, seq, project=project, limit=BATCH)
        for event in events:
            seq = event.seq
            yield f"id: {seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
        if len(events) == BATCH:
            continue
        with anyio.move_on_after(HEARTBEAT_S) as waited:
            await change.wait()
        if waited.cancelled_caught:
            yield ": alive\n\n"
