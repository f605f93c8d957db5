"""The HTTP service: the contract of text-embeddings-inference, and a playground."""

import asyncio
import contextlib
import hmac
import importlib.resources
import signal
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pabee_jax import __version__
from pabee_jax.serving.connections import BodyLimit, unless_disconnected
from pabee_jax.serving.schemas import (
    ErrorResponse,
    InferenceParameters,
    InferenceRequest,
    Info,
    Prediction,
    Predictions,
    PredictRequest,
)
from pabee_jax.serving.service import HEADERS, STATUS, TOO_LARGE, Service, ServiceError


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application.

    A service that is not ready warms up in the background. When the application stops, it answers
    the requests that it has accepted.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warmup = None
        if not service.is_ready:
            warmup = asyncio.create_task(asyncio.to_thread(service.warmup))
            warmup.add_done_callback(_end_if_failed)
        yield
        if warmup:
            warmup.cancel()
        await asyncio.get_running_loop().run_in_executor(None, service.engine.close)
        print(
            f"stopped: {service.answered} of {service.accepted} accepted requests were answered",
            flush=True,
        )

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (401, 413, 422, 424, 429, 503)
    }
    app = FastAPI(title="pabee_jax", version=__version__, lifespan=lifespan, responses=errors)
    _add_errors(app, service)
    if service.limits.cors_allow_origin:  # Added last, it also sees the answers of the others.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.limits.cors_allow_origin,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
            expose_headers=HEADERS,
        )

    async def check_key(request: Request) -> None:
        expected = f"Bearer {service.limits.api_key}".encode()
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if service.limits.api_key and not hmac.compare_digest(given, expected):
            raise ServiceError("Unauthorized", "the bearer key is missing or wrong")

    async def predict(body: PredictRequest, request: Request, response: Response) -> Predictions:
        if not service.is_ready:
            raise ServiceError("Unhealthy", "the service is compiling its programs")
        method = "batch" if body.is_batch else "single"
        service.metrics.requests.labels(method=method).inc()
        start = time.monotonic()
        service.accepted += 1
        try:
            result, headers = await unless_disconnected(request, service.predict(body))
        except Exception:  # It is answered with an error. A cancelled request is not answered.
            service.answered += 1
            raise
        service.answered += 1
        service.metrics.duration.observe(time.monotonic() - start)
        service.metrics.successes.labels(method=method).inc()
        response.headers.update(headers)
        return result

    keyed = [Depends(check_key)]
    app.post("/predict", response_model=Predictions, dependencies=keyed)(predict)

    @app.post("/", response_model=list[list[Prediction]], dependencies=keyed)
    async def classify(
        body: InferenceRequest, request: Request, response: Response
    ) -> list[list[Prediction]]:
        """Answer `huggingface_hub.InferenceClient.text_classification`."""
        parameters = body.parameters or InferenceParameters()
        inner = PredictRequest(**body.model_dump(exclude={"parameters"}))
        inner.raw_scores |= parameters.function_to_apply == "none"
        result: Any = await predict(inner, request, response)
        return [row[: parameters.top_k] for row in (result if inner.is_batch else [result])]

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> HTMLResponse:
        return _page()

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        if not service.is_ready:
            raise ServiceError("Unhealthy", "the service is compiling its programs")
        return Response()

    @app.get("/info", dependencies=keyed)
    async def info() -> Info:
        return service.info()

    @app.get("/metrics", dependencies=keyed, response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _end_if_failed(warmup: asyncio.Task) -> None:
    """Stop the process if its programs cannot be compiled: it would never become ready."""
    if not warmup.cancelled() and (error := warmup.exception()):
        traceback.print_exception(error)
        signal.raise_signal(signal.SIGTERM)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Give every error the same body, and refuse bodies that are too large before reading them."""

    def respond(error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        service.metrics.failures.labels(err=error.body.error_type).inc()
        return JSONResponse(error.body.model_dump(), error.status, headers)

    @app.exception_handler(ServiceError)
    async def on_service_error(_: Request, error: ServiceError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["loc"] == ("body",):  # FastAPI does not decode a body with another header.
            reason = "it must be a JSON object, with the header content-type: application/json"
            return respond(ServiceError("Validation", f"body: {reason}"))
        place = ".".join(str(part) for part in first["loc"])
        return respond(ServiceError("Validation", f"{place}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI answers a body that it cannot decode with status 400.
        status = STATUS["Validation"] if error.status_code == 400 else error.status_code
        headers = dict(error.headers or {})
        if "Allow" in headers:  # Starlette lists the methods of one route.
            headers["Allow"] = ", ".join(_methods(app, request.url.path))
        return respond(ServiceError("Validation", str(error.detail), status), headers)

    @app.exception_handler(Exception)
    async def on_failure(_: Request, error: Exception) -> JSONResponse:
        return respond(ServiceError("Backend", f"{type(error).__name__}: {error}"))

    limit = service.limits.max_body_bytes
    too_large = ServiceError("Validation", f"the request has more than {limit} bytes", TOO_LARGE)
    app.add_middleware(BodyLimit, limit=limit, refusal=lambda: respond(too_large))


def _methods(app: FastAPI, path: str) -> list[str]:
    """Return the methods of a path."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path == path]
    return sorted({method for route in routes for method in route.methods or ()})


def _page() -> HTMLResponse:
    """Return the playground."""
    text = importlib.resources.files("pabee_jax.serving").joinpath("page.html").read_text("utf-8")
    return HTMLResponse(text)
