"""The application: routes, error answers, the API's documentation."""

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from colmeia import __version__
from colmeia.api import console, event, host, identity, image, operation, vm
from colmeia.api.edge import PROBLEM_TYPE, ProblemDocument, problem
from colmeia.control.services import Services
from colmeia.model.errors import ColmeiaError, Internal, Invalid, NotFound

log = structlog.get_logger()

DESCRIPTION = """\
Every change answers 202 with an *operation*; `GET /v1/operations/{id}?wait=60` waits for its end and `GET /v1/events`
tells of everything that happens. Errors are `application/problem+json` with a stable `code` and a `hint`.
Locally: `curl --unix-socket /run/colmeia/api.sock http://localhost/v1/vms`. Over TCP: TLS and a bearer token."""


def create_app(services: Services) -> FastAPI:
    """Build the application around the services."""
    app = FastAPI(
        title="Colmeia",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.services = services
    app.state.own_uid = os.getuid()
    for module in (host, vm, image, operation, event, identity, console):
        app.include_router(module.router)
    app.add_exception_handler(ColmeiaError, _known_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)
    app.openapi = _described(app, app.openapi)  # type: ignore[method-assign]
    _serve_docs(app)
    return app


async def _known_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ColmeiaError)
    return problem(error)


async def _invalid_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [
        {"field": _field(one["loc"]), "message": str(one["msg"]).removeprefix("Value error, ")}
        for one in error.errors()
    ]  # the rejected input itself is left out: it may hold a secret
    detail = "{field}: {message}.".format(**found[0]) if found else "The request is not valid."
    return problem(Invalid("invalid_request", detail, "See errors for each field, and /docs for the shape."), found)


def _field(place: Sequence[int | str]) -> str:
    """Name a field as its sender does: without the part of the request it was in."""
    return ".".join(str(part) for part in place[1:]) or str(place[0])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem(NotFound("no_such_path", f"There is nothing at {request.url.path[:100]}.", "See /docs."))
    wrong = Invalid("bad_request", f"{request.method} {request.url.path[:100]}: {error.detail}.", "See /docs.")
    document = ProblemDocument(
        type=f"urn:colmeia:{wrong.code}",
        title="bad request",
        status=error.status_code,
        kind=wrong.kind,
        code=wrong.code,
        detail=wrong.message,
        hint=wrong.hint,
    )
    body = document.model_dump_json(exclude_none=True)
    return Response(body, error.status_code, media_type=PROBLEM_TYPE, headers=dict(error.headers or {}))


async def _defect(request: Request, error: Exception) -> Response:
    log.error("api.defect", method=request.method, path=request.url.path, exc_info=error)
    return problem(
        Internal("internal", f"A defect: {type(error).__name__}.", "Please report it with the daemon's log.")
    )


def _described(app: FastAPI, generate: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
    """Put the problem document and the token scheme into the OpenAPI document, once."""

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            document = generate()
            components: dict[str, dict[str, object]] = document["components"]  # type: ignore[assignment]
            for dropped in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(dropped, None)
            components["schemas"]["ProblemDocument"] = ProblemDocument.model_json_schema()
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _serve_docs(app: FastAPI) -> None:
    """Serve Swagger UI from its own package: a machine without the internet has documentation too."""
    import swagger_ui_bundle

    folder = Path(swagger_ui_bundle.swagger_ui_path)
    app.mount("/docs/assets", StaticFiles(directory=folder), name="docs-assets")

    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Colmeia API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon-32x32.png",
        )

    route: Callable[[], Awaitable[HTMLResponse]] = docs
    app.add_api_route("/docs", route, include_in_schema=False)
